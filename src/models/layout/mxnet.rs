//! insightface's networks in MXNet, LResNet18E-IR to LResNet100E-IR (deepinsight/insightface, symbols/fresnet.py).

use candle_core::{Result, Tensor, bail};

use super::{Tensors, insert};
use crate::ops::batch_norm;
use crate::preprocessing::Preprocessing;

/// Epsilon that their batch norm adds to the variance.
const EPS: f64 = 2e-5;

/// Returns the preprocessing that is part of their graph.
pub(super) fn preprocessing() -> Preprocessing {
    Preprocessing { std: 128.0, ..Preprocessing::default() }
}

/// Names of the layers outside the blocks; those of batch norms end with an underscore.
const AROUND: [(&str, &str); 7] = [
    ("conv0_weight", "conv1.weight"),
    ("bn0_", "bn1."),
    ("relu0_gamma", "prelu.weight"),
    ("bn1_", "bn2."),
    ("pre_fc1_weight", "fc.weight"),
    ("pre_fc1_bias", "fc.bias"),
    ("fc1_", "features."),
];

/// Names of the layers of a block.
const BLOCK: [(&str, &str); 8] = [
    ("bn1_", "bn1."),
    ("conv1_weight", "conv1.weight"),
    ("bn2_", "bn2."),
    ("relu1_gamma", "prelu.weight"),
    ("conv2_weight", "conv2.weight"),
    ("bn3_", "bn3."),
    ("conv1sc_weight", "downsample.0.weight"),
    ("sc_", "downsample.1."),
];

const NORM: [(&str, &str); 4] =
    [("gamma", "weight"), ("beta", "bias"), ("moving_mean", "running_mean"), ("moving_var", "running_var")];

/// Returns the tensors under our names, adjusted to our epsilon; unknown names are kept.
pub(super) fn rename(tensors: Tensors, notes: &mut Vec<String>) -> Result<Tensors> {
    if tensors.contains_key("stage1_unit1_se_conv1_weight") {
        bail!("squeeze-excitation with biases and PReLU (SE-LResNet-E-IR) cannot be loaded");
    }
    let mut renamed = Tensors::new();
    for (name, tensor) in tensors {
        let Some(ours) = ours(&name) else {
            insert(&mut renamed, name, tensor)?;
            continue;
        };
        let tensor = adapt(&ours, tensor)?;
        insert(&mut renamed, ours, tensor)?;
    }
    notes.push(format!(
        "batch norm: the variances are adjusted for an epsilon of {EPS:e} instead of {:e}; the last gamma is set to 1",
        batch_norm::EPS
    ));
    Ok(renamed)
}

fn adapt(ours: &str, tensor: Tensor) -> Result<Tensor> {
    match ours {
        // `fix_gamma`: the stored values are not used.
        "features.weight" => tensor.ones_like(),
        _ if ours.ends_with("running_var") => tensor + (EPS - batch_norm::EPS),
        _ => Ok(tensor),
    }
}

fn ours(name: &str) -> Option<String> {
    let Some(rest) = name.strip_prefix("stage") else { return layer(name, &AROUND) };
    let (stage, rest) = rest.split_once("_unit")?;
    let (unit, rest) = rest.split_once('_')?;
    let (stage, unit): (usize, usize) = (stage.parse().ok()?, unit.parse().ok()?);
    Some(format!("layer{stage}.{}.{}", unit.checked_sub(1)?, layer(rest, &BLOCK)?))
}

fn layer(name: &str, table: &[(&str, &str)]) -> Option<String> {
    table.iter().find_map(|(theirs, ours)| {
        let leaf = name.strip_prefix(theirs)?;
        if !theirs.ends_with('_') {
            return leaf.is_empty().then(|| (*ours).to_owned());
        }
        let (_, leaf) = NORM.iter().find(|(theirs, _)| *theirs == leaf)?;
        Some(format!("{ours}{leaf}"))
    })
}
