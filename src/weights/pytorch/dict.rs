//! Dicts of a pickle, read, and dicts of named tensors, written.

use std::borrow::Cow;
use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::pickle::{Id, Pickle, Value, shown};

/// Maximum length of a tensor's name in bytes.
pub(super) const MAX_NAME_LENGTH: usize = 1024;

/// Returns the items of a dict or of a dict-like object, such as an `OrderedDict`.
pub(super) fn entries<'p>(pickle: &'p Pickle<'_>, id: Id) -> Option<Cow<'p, [(Id, Id)]>> {
    match pickle.get(id) {
        Value::Dict(items) => Some(Cow::Borrowed(items)),
        Value::Object(object) if !object.items.is_empty() => Some(Cow::Borrowed(&object.items)),
        Value::Object(object) if pickle.global(object.callable) == Some(("collections", "OrderedDict")) => {
            // Python 2 writes a list of [key, value] lists.
            let pairs = match pickle.elements(object.args)? {
                [] => &[],
                [list] => pickle.elements(*list)?,
                _ => return None,
            };
            let pair = |id: &Id| match pickle.elements(*id)? {
                [key, value] => Some((*key, *value)),
                _ => None,
            };
            pairs.iter().map(pair).collect()
        }
        _ => None,
    }
}

/// Inserts a tensor, whose name must be new and at most [`MAX_NAME_LENGTH`] bytes long.
pub(super) fn insert(tensors: &mut BTreeMap<String, Tensor>, name: String, tensor: Tensor) -> Result<(), String> {
    if name.len() > MAX_NAME_LENGTH {
        return Err(format!(
            "tensor {}: a name of {} bytes, expected at most {MAX_NAME_LENGTH}",
            shown(&name),
            name.len()
        ));
    }
    if tensors.contains_key(&name) {
        return Err(format!("tensor {} occurs twice", shown(&name)));
    }
    tensors.insert(name, tensor);
    Ok(())
}
