//! Sizes of an IResNet, from its tensors under our names.

use candle_core::{Result, bail};

use super::{Tensors, dims, input_size, num_blocks};
use crate::models::{Arch, ModelConfig};

const ARCHS: [Arch; 5] = [Arch::R18, Arch::R34, Arch::R50, Arch::R100, Arch::R200];

pub(super) fn config(tensors: &Tensors) -> Result<ModelConfig> {
    let mut found = [0; 4];
    for (stage, blocks) in found.iter_mut().enumerate() {
        *blocks = num_blocks(tensors, &format!("layer{}.", stage + 1))?;
    }
    let Some(arch) = ARCHS.into_iter().find(|arch| arch.layers() == Some(found)) else {
        let known = ARCHS.map(|arch| format!("{:?}", arch.layers().unwrap_or_default())).join(", ");
        bail!("the stages have {found:?} blocks; supported are {known}");
    };
    let channels = match dims(tensors, "conv1.weight")? {
        // Up to twice the published width, the limit of `ModelConfig`.
        [c @ 1..=128, 3, 3, 3] => *c,
        found => bail!("conv1.weight: expected (1 to 128, 3, 3, 3), found {found:?}"),
    };
    let &[embedding_size, inputs] = dims(tensors, "fc.weight")? else {
        bail!("fc.weight: expected a matrix, found {:?}", dims(tensors, "fc.weight")?);
    };
    Ok(ModelConfig {
        arch,
        embedding_size,
        width: channels as f64 / 64.0,
        input_size: input_size("fc.weight", inputs, 8 * channels)?,
        dropout: 0.0,
        squeeze_excitation: tensors.keys().any(|name| name.contains(".se_block.")),
    })
}
