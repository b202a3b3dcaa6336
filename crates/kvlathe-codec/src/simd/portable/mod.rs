//! The text that every processor runs.

mod floats;
mod multiply;
mod unpack_codes;
