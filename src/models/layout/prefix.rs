//! Prefixes that wrappers and file formats put before every name, and what lies beside a network.

use std::collections::BTreeSet;

use candle_core::{Result, bail};

use super::{Layout, Tensors, insert};

/// First parts of names that training leaves beside a network without a prefix: classifiers, losses, counters.
const BESIDE: [&str; 9] =
    ["kernel", "head", "loss", "criterion", "margin", "classifier", "data_preprocessor", "n_averaged", "arcface"];

/// Parts of names of layers between a network and its classifier, which may change the embedding.
const NECKS: [&str; 7] = ["neck", "bottleneck", "bnneck", "proj", "projection", "embed", "embedding"];

/// First parts of names by DDP, Lightning and the hub's wrappers, CVLface, joint checkpoints, `torch.compile`.
const WRAPPERS: [&str; 7] = ["module", "model", "net", "backbone", "encoder", "student", "_orig_mod"];

/// Most names listed in a message.
const MAX_LISTED: usize = 20;

/// MXNet's prefixes of trained parameters and of running statistics.
const MXNET_MARKS: [&str; 2] = ["arg:", "aux:"];

/// Removes the prefix of a network's names, such as `module.backbone.`, and what lies beside the network.
///
/// # Errors
/// When there are several networks, or layers beside the network may change its embedding.
pub(super) fn strip(tensors: Tensors, notes: &mut Vec<String>) -> Result<Tensors> {
    let tensors = unmark(tensors)?;
    let prefixes = prefixes(&tensors);
    let prefix = match &prefixes[..] {
        // Of an unknown layout, which is an error that names it without the wrappers.
        [] => return Ok(unwrapped(tensors)),
        [prefix] => prefix.clone(),
        [first, second, ..] => {
            let shown = |prefix: &str| if prefix.is_empty() { "no prefix".to_owned() } else { prefix.to_owned() };
            bail!("there are several networks, with the prefixes {} and {}: expected one", shown(first), shown(second));
        }
    };
    let is_beside = |name: &str| match prefix.as_str() {
        "" => BESIDE.contains(&name.split('.').next().unwrap_or_default()),
        prefix => !name.starts_with(prefix),
    };
    let (beside, network): (Tensors, Tensors) = tensors.into_iter().partition(|(name, _)| is_beside(name));
    let rest = |(name, tensor): (String, _)| Some((name.strip_prefix(&prefix)?.to_owned(), tensor));
    let network: Tensors = network.into_iter().filter_map(rest).collect();
    check_beside(&beside, &network, &prefix)?;
    if !beside.is_empty() {
        notes.push(format!("what lies beside the network is left out: {}", listed(&beside)));
    }
    if !prefix.is_empty() {
        notes.push(format!("every name of the network has the prefix {prefix}: removed"));
    }
    Ok(network)
}

/// Removes the first parts of names that wrappers give all tensors.
fn unwrapped(mut tensors: Tensors) -> Tensors {
    // A bounded number of times: a name may be as long as a file.
    for _ in WRAPPERS {
        let Some((first, _)) = tensors.keys().next().and_then(|name| name.split_once('.')) else { break };
        if !WRAPPERS.contains(&first) {
            break;
        }
        let first = format!("{first}.");
        if !tensors.keys().all(|name| name.starts_with(&first)) {
            break;
        }
        tensors = tensors.into_iter().map(|(name, tensor)| (name[first.len()..].to_owned(), tensor)).collect();
    }
    tensors
}

/// Returns the prefixes, with their final point, under which all markers of a layout are.
fn prefixes(tensors: &Tensors) -> Vec<String> {
    let mut found = BTreeSet::new();
    for markers in Layout::NAMED.map(Layout::markers) {
        let [first, others @ ..] = markers else { continue };
        let before = tensors.keys().filter_map(|name| name.strip_suffix(first));
        let has_all = |prefix: &&str| others.iter().all(|marker| tensors.contains_key(&format!("{prefix}{marker}")));
        let is_whole = |prefix: &&str| prefix.is_empty() || prefix.ends_with('.');
        found.extend(before.filter(is_whole).filter(has_all).map(str::to_owned));
    }
    found.into_iter().collect()
}

/// Checks that what lies beside a network is not part of it.
fn check_beside(beside: &Tensors, network: &Tensors, prefix: &str) -> Result<()> {
    for name in beside.keys() {
        if name.split('.').any(|part| NECKS.contains(&part)) {
            bail!(
                "{name} lies between the network ({prefix}) and its classifier and may change the embedding: expected \
                 none"
            );
        }
        let rest = name.split_once('.').map_or(name.as_str(), |(_, rest)| rest);
        // A classifier is often called as the last layer of a network is.
        if network.contains_key(rest) && !matches!(rest, "fc.weight" | "fc.bias") {
            let (num, all) = (network.len(), network.len() + beside.len());
            bail!("{num} of {all} tensors begin with {prefix}, {name} does not and is of another network");
        }
    }
    Ok(())
}

fn listed(tensors: &Tensors) -> String {
    let names: Vec<&str> = tensors.keys().map(String::as_str).take(MAX_LISTED).collect();
    let more = if tensors.len() > names.len() { ", .." } else { "" };
    format!("{}{more}", names.join(", "))
}

fn unmark(tensors: Tensors) -> Result<Tensors> {
    let unmarked = |name: &str| MXNET_MARKS.iter().find_map(|mark| name.strip_prefix(mark)).map(str::to_owned);
    let mut plain = Tensors::new();
    for (name, tensor) in tensors {
        insert(&mut plain, unmarked(&name).unwrap_or(name), tensor)?;
    }
    Ok(plain)
}
