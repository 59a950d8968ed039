//! Parameters and buffers of a pickled `nn.Module`, named as in its `state_dict()`.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use super::dict::{MAX_NAME_LENGTH, entries, insert};
use super::rebuild::Rebuilder;
use crate::pickle::{Id, Pickle, Value, shown};

/// Maximum nesting of modules.
const MAX_MODULES: usize = 64;
/// Work allowed per byte of the pickle. A module that is used twice is listed twice, as in a `state_dict()`, so a few
/// bytes of a hostile pickle can stand for huge numbers of names. A genuine pickle has a hundred bytes or more per
/// tensor.
const WORK_PER_BYTE: usize = 8;

/// The dicts of attributes of an `nn.Module`.
pub(super) struct Module<'p> {
    parameters: Cow<'p, [(Id, Id)]>,
    buffers: Cow<'p, [(Id, Id)]>,
    modules: Cow<'p, [(Id, Id)]>,
    /// Names of buffers that `state_dict()` leaves out.
    hidden: &'p [Id],
    /// Number of entries read to find these.
    num_entries: usize,
}

/// Returns the dicts of a value if it is an `nn.Module`.
pub(super) fn module<'p>(pickle: &'p Pickle<'_>, id: Id) -> Option<Module<'p>> {
    let Value::Object(object) = pickle.get(id) else { return None };
    let Value::Dict(attributes) = pickle.get(object.state?) else { return None };
    let attribute = |name: &str| attributes.iter().find(|(k, _)| pickle.text(*k) == Some(name)).map(|(_, v)| *v);
    let dict = |name: &str| entries(pickle, attribute(name)?);
    let hidden = attribute("_non_persistent_buffers_set").and_then(|id| pickle.elements(id));
    let (parameters, buffers, modules) = (dict("_parameters")?, dict("_buffers")?, dict("_modules")?);
    let num_entries = attributes.len() + parameters.len() + buffers.len() + modules.len();
    Some(Module { parameters, buffers, modules, hidden: hidden.unwrap_or_default(), num_entries })
}

/// Returns the parameters and buffers of a module and its submodules, with names joined by dots.
pub(super) fn tensors<'a>(
    pickle: &Pickle<'a>,
    rebuilder: &mut Rebuilder<'_, 'a>,
    module: Module<'_>,
) -> Result<BTreeMap<String, Tensor>, String> {
    let budget = pickle.num_bytes().saturating_mul(WORK_PER_BYTE);
    let mut walk = Walk { pickle, rebuilder, budget, tensors: BTreeMap::new() };
    walk.module(&module, "", 0)?;
    Ok(walk.tensors)
}

struct Walk<'w, 'p, 'a> {
    pickle: &'w Pickle<'a>,
    rebuilder: &'w mut Rebuilder<'p, 'a>,
    /// Remaining work, in bytes of names and entries.
    budget: usize,
    tensors: BTreeMap<String, Tensor>,
}

impl Walk<'_, '_, '_> {
    fn module(&mut self, module: &Module<'_>, prefix: &str, depth: usize) -> Result<(), String> {
        if depth > MAX_MODULES {
            return Err(format!("modules are nested deeper than {MAX_MODULES}"));
        }
        self.spend(module.num_entries + module.hidden.len())?;
        let hidden: BTreeSet<&str> = module.hidden.iter().filter_map(|id| self.pickle.text(*id)).collect();
        for (key, value) in module.parameters.iter().chain(&*module.buffers) {
            let name = self.name(prefix, *key)?;
            let is_hidden = hidden.contains(&name[prefix.len()..]);
            if is_hidden || matches!(self.pickle.get(*value), Value::None) {
                continue;
            }
            let tensor = self.rebuilder.tensor(*value).map_err(|e| format!("tensor {}: {e}", shown(&name)))?;
            insert(&mut self.tensors, name, tensor)?;
        }
        for (key, value) in &*module.modules {
            let name = self.name(prefix, *key)?;
            if matches!(self.pickle.get(*value), Value::None) {
                continue;
            }
            let inner = self::module(self.pickle, *value).ok_or_else(|| {
                format!("module {}: expected a module, found {}", shown(&name), self.pickle.kind(*value))
            })?;
            self.module(&inner, &format!("{name}."), depth + 1)?;
        }
        Ok(())
    }

    /// Returns the full name of the entry `key` of the module with this prefix.
    fn name(&mut self, prefix: &str, key: Id) -> Result<String, String> {
        let key = self
            .pickle
            .text(key)
            .ok_or_else(|| format!("{}: a name is {}, expected a string", shown(prefix), self.pickle.kind(key)))?;
        let length = prefix.len() + key.len();
        if length > MAX_NAME_LENGTH {
            return Err(format!("{}: a name of {length} bytes, expected at most {MAX_NAME_LENGTH}", shown(prefix)));
        }
        self.spend(length + 32)?;
        Ok(format!("{prefix}{key}"))
    }

    fn spend(&mut self, work: usize) -> Result<(), String> {
        let left = self.budget.checked_sub(work).ok_or("modules contain each other too many times")?;
        self.budget = left;
        Ok(())
    }
}
