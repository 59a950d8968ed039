//! Prefixes that wrappers and file formats put before every name.

use candle_core::{Result, bail};

use super::{Tensors, insert};

/// Prefixes of DDP, Lightning and the hub's wrappers, CVLface, joint checkpoints, `torch.compile`.
const WRAPPERS: [&str; 6] = ["module.", "model.", "net.", "backbone.", "student.", "_orig_mod."];

/// Classifier in AdaFace's training checkpoints (mk-minchul/AdaFace, head.py), which is not part of the backbone.
const HEAD: [&str; 4] = ["head.kernel", "head.t", "head.batch_mean", "head.batch_std"];

/// MXNet's prefixes of trained parameters and of running statistics.
const MXNET_MARKS: [&str; 2] = ["arg:", "aux:"];

/// Removes the wrappers' prefixes, in any order, and the classifier beside a wrapped backbone.
///
/// # Errors
/// When only some of the names have the prefix.
pub(super) fn strip(tensors: Tensors, notes: &mut Vec<String>) -> Result<Tensors> {
    let mut tensors = unmark(tensors)?;
    let mut prefix = String::new();
    // A bounded number of times: a name may be as long as a file.
    for _ in WRAPPERS {
        let wrapper = WRAPPERS.iter().find(|p| tensors.keys().any(|name| name.starts_with(**p)));
        let Some(wrapper) = wrapper else { break };
        let others: Vec<&str> = tensors.keys().map(String::as_str).filter(|name| !name.starts_with(wrapper)).collect();
        if !others.is_empty() {
            let named = others.len().min(20);
            let list = others[..named].join(", ");
            if others.iter().any(|name| !HEAD.contains(name)) {
                let more = if others.len() > named { ", .." } else { "" };
                bail!(
                    "{} of {} tensors begin with {prefix}{wrapper}, {} do not and belong to something else: {list}{more}",
                    tensors.len() - others.len(),
                    tensors.len(),
                    others.len()
                );
            }
            notes.push(format!("the classifier beside the network is left out: {list}"));
        }
        let rest = |(name, tensor): (String, _)| Some((name.strip_prefix(wrapper)?.to_owned(), tensor));
        tensors = tensors.into_iter().filter_map(rest).collect();
        prefix += wrapper;
    }
    if !prefix.is_empty() {
        notes.push(format!("every name of the network has the prefix {prefix}: removed"));
    }
    Ok(tensors)
}

fn unmark(tensors: Tensors) -> Result<Tensors> {
    let unmarked = |name: &str| MXNET_MARKS.iter().find_map(|mark| name.strip_prefix(mark)).map(str::to_owned);
    let mut plain = Tensors::new();
    for (name, tensor) in tensors {
        insert(&mut plain, unmarked(&name).unwrap_or(name), tensor)?;
    }
    Ok(plain)
}
