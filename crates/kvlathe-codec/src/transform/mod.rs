//! The transform between vectors and coefficients: what is calibrated, and what is prepared from it.

pub(crate) mod basis;
mod linalg;
pub(crate) mod queries;
pub(crate) mod query_tables;
pub(crate) mod rope;
pub(crate) mod stream_set;
pub(crate) mod sums;
pub(crate) mod tables;
