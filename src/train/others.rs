//! What later steps depend on beside the student and the head, by the file that it is kept in.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::error::{Error, Result};

/// Tensors by name, by file.
pub(super) type Others = BTreeMap<String, BTreeMap<String, Tensor>>;

/// Whose the tensors of a saved optimiser are.
pub(super) const STUDENT: &str = "student";
pub(super) const HEAD: &str = "head";
/// Files, and the last also whose tensors of an optimiser are.
pub(super) const OPTIMIZER: &str = "optimizer";
pub(super) const EMA: &str = "ema";
pub(super) const PROJECTION: &str = "projection";

/// Tensors with the name of whose they are before their own.
pub(super) fn named(part: &str, tensors: BTreeMap<String, Tensor>) -> impl Iterator<Item = (String, Tensor)> {
    tensors.into_iter().map(move |(name, tensor)| (format!("{part}.{name}"), tensor))
}

/// The tensors of a file.
pub(super) fn file<'a>(others: &'a Others, name: &str) -> Result<&'a BTreeMap<String, Tensor>> {
    others.get(name).ok_or_else(|| Error::Training(format!("the state of a training has no {name}")))
}

/// What the optimiser of a part remembers: the inverse of [`named`].
pub(super) fn optimizer(others: &Others, part: &str) -> Result<BTreeMap<String, Tensor>> {
    let of_part = |(name, tensor): (&String, &Tensor)| {
        Some((name.strip_prefix(part)?.strip_prefix('.')?.to_owned(), tensor.clone()))
    };
    Ok(file(others, OPTIMIZER)?.iter().filter_map(of_part).collect())
}
