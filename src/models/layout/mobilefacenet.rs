//! Sizes of a MobileFaceNet, from its tensors under our names.

use candle_core::{Result, bail};

use super::{Tensors, dims, input_size, num_blocks};
use crate::models::{Arch, MobileFaceNetConfig, ModelConfig};

/// The depthwise convolution over the whole map, which only arcface_torch's own head has.
const GLOBAL_DEPTHWISE: &str = "features.layers.0.layers.0.weight";

pub(super) fn config(tensors: &Tensors) -> Result<ModelConfig> {
    let base = match dims(tensors, "conv_sep.layers.0.weight")? {
        [c @ 8..=1024, _, 1, 1] if c.is_multiple_of(8) => c / 8,
        found => bail!("conv_sep.layers.0.weight: expected (8 to 1024 by 8, channels, 1, 1), found {found:?}"),
    };
    let arch = if tensors.contains_key(GLOBAL_DEPTHWISE) { Arch::MbfGdc } else { Arch::Mbf };
    let config = ModelConfig { arch, width: base as f64 / 64.0, ..ModelConfig::default() };

    let sizes = MobileFaceNetConfig::of(&config);
    let mut blocks = [1; 4];
    for (i, blocks) in blocks.iter_mut().enumerate() {
        // A single first block is one convolution instead of a list.
        if i > 0 || !tensors.contains_key("layers.1.layers.0.weight") {
            *blocks = num_blocks(tensors, &format!("layers.{}.layers.", 2 * i + 1))?;
        }
    }
    let stem = dims(tensors, "layers.0.layers.0.weight")?;
    if blocks != sizes.blocks || stem != [sizes.scale * base, 3, 3, 3] {
        bail!(
            "found {blocks:?} blocks and a first convolution {stem:?} ([2, 8, 12, 4] and [256, 3, 3, 3] are mbf_large's); \
             supported is mbf with {:?} blocks and {:?}",
            sizes.blocks,
            [sizes.scale * base, 3, 3, 3]
        );
    }
    let (matrix, input_size) = if arch == Arch::MbfGdc {
        match dims(tensors, GLOBAL_DEPTHWISE)? {
            // The largest image that `ModelConfig` allows leaves a map of 14 x 14.
            [_, 1, h @ 1..=14, w] if h == w => ("features.layers.2.weight", 16 * h),
            found => {
                bail!("{GLOBAL_DEPTHWISE}: expected (channels, 1, side, side) with a side up to 14, found {found:?}")
            }
        }
    } else {
        let inputs = dims(tensors, "fc.weight")?.get(1).copied().unwrap_or(0);
        ("fc.weight", input_size("fc.weight", inputs, base)?)
    };
    let &[embedding_size, _] = dims(tensors, matrix)? else {
        bail!("{matrix}: expected a matrix, found {:?}", dims(tensors, matrix)?);
    };
    Ok(ModelConfig { embedding_size, input_size, ..config })
}
