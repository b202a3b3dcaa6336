//! Every instruction set of the machine against the portable text.

mod floats;
mod products;
