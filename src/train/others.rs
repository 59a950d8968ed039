//! Training state apart from the student and the head (optimisers, moving average, projection), by file.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::error::{Error, Result};

/// Tensors by file, then by name.
pub(super) type Others = BTreeMap<String, BTreeMap<String, Tensor>>;

/// Prefixes of tensor names in the optimiser file.
pub(super) const STUDENT: &str = "student";
pub(super) const HEAD: &str = "head";
/// File names; `PROJECTION` is also a prefix in the optimiser file.
pub(super) const OPTIMIZER: &str = "optimizer";
pub(super) const EMA: &str = "ema";
pub(super) const PROJECTION: &str = "projection";

/// Adds the prefix of `part` to the names of its tensors.
pub(super) fn named(part: &str, tensors: BTreeMap<String, Tensor>) -> impl Iterator<Item = (String, Tensor)> {
    tensors.into_iter().map(move |(name, tensor)| (format!("{part}.{name}"), tensor))
}

/// Returns the tensors of a file.
pub(super) fn file<'a>(others: &'a Others, name: &str) -> Result<&'a BTreeMap<String, Tensor>> {
    others.get(name).ok_or_else(|| Error::Training(format!("the training checkpoint has no {name}")))
}

/// Returns the optimiser state of `part`, with the prefix removed: the inverse of [`named`].
pub(super) fn optimizer(others: &Others, part: &str) -> Result<BTreeMap<String, Tensor>> {
    let of_part = |(name, tensor): (&String, &Tensor)| {
        Some((name.strip_prefix(part)?.strip_prefix('.')?.to_owned(), tensor.clone()))
    };
    Ok(file(others, OPTIMIZER)?.iter().filter_map(of_part).collect())
}
