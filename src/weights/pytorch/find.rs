//! Selects the tensors of the model among the values of a checkpoint.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use super::dict::{entries, insert};
use super::rebuild::Rebuilder;
use super::walk::{self, module};
use crate::pickle::{Id, Pickle, Value, shown};

/// Keys that lead to a model; the first one with tensors wins.
const MODEL_KEYS: [&str; 18] = [
    "state_dict",
    "model_state_dict",
    "net_state_dict",
    "state_dict_backbone",
    "backbone_state_dict",
    "student_state_dict",
    "model",
    "net",
    "network",
    "backbone",
    "student",
    "module",
    "params",
    "weights",
    "encoder",
    "ema",
    "model_ema",
    "state_dict_ema",
];
/// Maximum nesting of such keys, as in `{'model': {'state_dict': ...}}`.
const MAX_NESTING: usize = 4;
/// Maximum number of items listed in a message.
const MAX_LISTED: usize = 20;

/// The tensors of the model, and notes for the user.
pub(super) struct Found {
    pub(super) tensors: BTreeMap<String, Tensor>,
    pub(super) notes: Vec<String>,
}

/// Returns the tensors; the error describes what was found instead.
pub(super) fn find<'a>(pickle: &Pickle<'a>, rebuilder: &mut Rebuilder<'_, 'a>) -> Result<Found, String> {
    let mut search = Search { pickle, rebuilder, seen: BTreeSet::new(), notes: Vec::new() };
    let mut keys = Vec::new();
    let place = search.locate(pickle.root(), &mut keys);
    let mut notes = search.notes;
    let mut found = match place {
        Some(place) => match module(pickle, place) {
            Some(module) => {
                notes.push(format!("tensors taken from a pickled module, {}", class_name(pickle, place)));
                Found { tensors: walk::tensors(pickle, rebuilder, module)?, notes: Vec::new() }
            }
            None => take_dict(pickle, rebuilder, &entries(pickle, place).unwrap_or_default())?,
        },
        None => return Err(format!("no tensors found: {}", outermost(pickle, rebuilder))),
    };
    if found.tensors.is_empty() {
        return Err(format!("no tensors found: {} has no parameters", class_name(pickle, pickle.root())));
    }
    if !keys.is_empty() {
        notes.push(format!("tensors taken from {}", keys.join(" / ")));
    }
    notes.append(&mut found.notes);
    Ok(Found { tensors: found.tensors, notes })
}

/// Search for a dict of tensors or a module that visits each value once.
struct Search<'s, 'p, 'a> {
    pickle: &'s Pickle<'a>,
    rebuilder: &'s Rebuilder<'p, 'a>,
    seen: BTreeSet<Id>,
    notes: Vec<String>,
}

impl Search<'_, '_, '_> {
    /// Returns the first value with tensors at or below `value`, and leaves the keys that lead to it in `keys`.
    fn locate(&mut self, value: Id, keys: &mut Vec<&'static str>) -> Option<Id> {
        if keys.len() > MAX_NESTING || !self.seen.insert(value) {
            return None;
        }
        if module(self.pickle, value).is_some() {
            return Some(value);
        }
        let entries = entries(self.pickle, value)?;
        let mut found = None;
        for key in MODEL_KEYS {
            let inner = entries.iter().find(|(k, _)| self.pickle.text(*k) == Some(key)).map(|(_, inner)| *inner);
            let Some(inner) = inner else { continue };
            let mut path = [&keys[..], &[key]].concat();
            match (&found, self.locate(inner, &mut path)) {
                (_, None) => {}
                (None, Some(place)) => found = Some((place, path)),
                (Some((_, taken)), Some(_)) => {
                    let (taken, other) = (taken.join(" / "), path.join(" / "));
                    self.notes.push(format!("there are tensors in {other} too; {taken} is used"));
                }
            }
        }
        // Beside a model there may be metrics, which are tensors too.
        let is_tensor = |(_, value): &(Id, Id)| self.rebuilder.is_tensor(*value);
        match found {
            Some((place, path)) => {
                *keys = path;
                Some(place)
            }
            None => entries.iter().any(is_tensor).then_some(value),
        }
    }
}

/// Returns the name of a value's class; legacy files wrap it as `('module', class, file, source)`.
fn class_name(pickle: &Pickle<'_>, id: Id) -> String {
    if let Value::Object(object) = pickle.get(id)
        && let Value::PersistentId(reference) = pickle.get(object.callable)
        && let Some([_, class, ..]) = pickle.elements(*reference)
        && let Some((module, name)) = pickle.global(*class)
    {
        return format!("a {}", shown(&format!("{module}.{name}")));
    }
    pickle.kind(id)
}

/// Describes the outermost value, for the error.
fn outermost(pickle: &Pickle<'_>, rebuilder: &Rebuilder<'_, '_>) -> String {
    let root = pickle.root();
    if rebuilder.is_tensor(root) {
        return "the file is one tensor without a name, expected a dict of tensors".to_owned();
    }
    let Some(entries) = entries(pickle, root) else {
        return format!(
            "the file is {}, expected a dict of tensors or one with a key such as state_dict",
            pickle.kind(root)
        );
    };
    let kinds: Vec<String> =
        entries.iter().map(|(key, value)| format!("{}: {}", key_shown(pickle, *key), pickle.kind(*value))).collect();
    format!("expected a dict of tensors or one with a key such as state_dict, found the keys {{{}}}", listed(&kinds))
}

fn key_shown(pickle: &Pickle<'_>, key: Id) -> String {
    pickle.text(key).map_or_else(|| format!("({})", pickle.kind(key)), shown)
}

/// Formats the first items of `all`, and the number of those left out.
fn listed(all: &[String]) -> String {
    let first = all.iter().take(MAX_LISTED).cloned().collect::<Vec<_>>().join(", ");
    if all.len() > MAX_LISTED { format!("{first} and {} more", all.len() - MAX_LISTED) } else { first }
}

/// Returns the tensors of a dict; a note lists its other values.
fn take_dict(pickle: &Pickle<'_>, rebuilder: &mut Rebuilder<'_, '_>, entries: &[(Id, Id)]) -> Result<Found, String> {
    let mut tensors = BTreeMap::new();
    let mut others = Vec::new();
    for (key, value) in entries {
        if !rebuilder.is_tensor(*value) {
            others.push(format!("{} ({})", key_shown(pickle, *key), pickle.kind(*value)));
            continue;
        }
        let name = pickle
            .text(*key)
            .ok_or_else(|| format!("a tensor has {} for a name, expected a string", pickle.kind(*key)))?;
        let tensor = rebuilder.tensor(*value).map_err(|e| format!("tensor {}: {e}", shown(name)))?;
        insert(&mut tensors, name.to_owned(), tensor)?;
    }
    let mut notes = Vec::new();
    if !others.is_empty() {
        notes.push(format!("left out {} values that are not tensors: {}", others.len(), listed(&others)));
    }
    Ok(Found { tensors, notes })
}
