//! Networks whose convolutions compute with 8-bit integers.

use std::collections::BTreeMap;

use crate::ops::conv::int8::{Affine, Int8Weight};

/// A convolution of 8-bit integers.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantisedConv {
    /// Its filter.
    pub weight: Int8Weight,
    /// Quantisation of what it reads.
    pub input: Affine,
}

/// The convolutions of a network that compute with 8-bit integers, by their paths. All else computes in f32.
pub type Quantisation = BTreeMap<String, QuantisedConv>;
