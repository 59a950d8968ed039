//! CVLface's and AdaFace's IR networks: the blocks of all stages are one list, and a shortcut has no parameters where
//! the number of channels does not change (mk-minchul/CVLface, models/iresnet/model.py; mk-minchul/AdaFace, net.py).

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{COUNTER, Tensors, dims, insert, num_blocks};
use crate::ops::batch_norm::IDENTITY_VAR;

/// Our names for the numbered layers of a block.
const BLOCK: [(&str, &str); 10] = [
    ("res_layer.0.", "bn1."),
    ("res_layer.1.", "conv1."),
    ("res_layer.2.", "bn2."),
    ("res_layer.3.", "prelu."),
    ("res_layer.4.", "conv2."),
    ("res_layer.5.", "bn3."),
    ("res_layer.se_block.fc1.", "se_block.fc1."),
    ("res_layer.se_block.fc2.", "se_block.fc2."),
    ("shortcut_layer.0.", "downsample.0."),
    ("shortcut_layer.1.", "downsample.1."),
];

/// Our names for the layers before and after the blocks; layers 1 and 2 of the output are dropout and flattening.
const AROUND: [(&str, &str); 6] = [
    ("input_layer.0.", "conv1."),
    ("input_layer.1.", "bn1."),
    ("input_layer.2.", "prelu."),
    ("output_layer.0.", "bn2."),
    ("output_layer.3.", "fc."),
    ("output_layer.4.", "features."),
];

/// Returns the tensors under our names; unknown names are kept.
pub(super) fn rename(tensors: Tensors, notes: &mut Vec<String>) -> Result<Tensors> {
    let blocks = stages(&tensors)?;
    let mut renamed = Tensors::new();
    for (name, tensor) in tensors {
        let ours = ours(&name, &blocks).unwrap_or(name);
        insert(&mut renamed, ours, tensor)?;
    }
    for block in blocks.iter().filter(|b| b.is_first && b.c_in == b.c_out) {
        let path = format!("{}downsample.", block.path);
        if renamed.keys().any(|name| name.starts_with(&path)) {
            continue;
        }
        insert(&mut renamed, format!("{path}0.weight"), identity_conv(block.c_out)?)?;
        for (leaf, tensor) in identity_norm(block.c_out)? {
            insert(&mut renamed, format!("{path}1.{leaf}"), tensor)?;
        }
        notes.push(format!(
            "{} has a shortcut without parameters: filled with the identity. In evaluation the result is the same; \
             training with batch statistics would normalise the shortcut",
            block.path.trim_end_matches('.')
        ));
    }
    if let Some(mean) = renamed.get("features.running_mean") {
        let channels = mean.dims().to_vec();
        if !renamed.contains_key("features.weight") && !renamed.contains_key("features.bias") {
            insert(
                &mut renamed,
                "features.weight".into(),
                Tensor::ones(channels.as_slice(), DType::F32, &Device::Cpu)?,
            )?;
            insert(&mut renamed, "features.bias".into(), Tensor::zeros(channels, DType::F32, &Device::Cpu)?)?;
            notes.push("the last batch norm has neither weight nor bias: filled with 1 and 0".into());
        }
    }
    Ok(renamed)
}

/// A block and its place in our network.
struct Block {
    /// Path of the block, such as `layer2.0.`.
    path: String,
    is_first: bool,
    c_in: usize,
    c_out: usize,
}

/// Splits the list of blocks into stages where the number of channels changes.
fn stages(tensors: &Tensors) -> Result<Vec<Block>> {
    let block_has = |leaf: &str| tensors.contains_key(&format!("body.0.res_layer.{leaf}"));
    if block_has("8.running_mean") {
        bail!("blocks of three convolutions (IR-152, IR-200): only blocks of two can be loaded");
    }
    if !block_has("2.running_mean") && block_has("4.running_mean") {
        bail!(
            "blocks without a batch norm after the first convolution (InsightFace_Pytorch, face.evoLVe): these \
               networks cannot be loaded"
        );
    }
    let mut blocks: Vec<Block> = Vec::new();
    let (mut stage, mut unit) = (0, 0);
    for i in 0..num_blocks(tensors, "body.")? {
        let name = format!("body.{i}.res_layer.1.weight");
        let &[c_out, c_in, 3, 3] = dims(tensors, &name)? else {
            bail!("{name}: expected (channels, channels, 3, 3), found {:?}", dims(tensors, &name)?);
        };
        let is_first = blocks.last().is_none_or(|last| last.c_out != c_out);
        (stage, unit) = if is_first { (stage + 1, 0) } else { (stage, unit + 1) };
        blocks.push(Block { path: format!("layer{stage}.{unit}."), is_first, c_in, c_out });
    }
    Ok(blocks)
}

fn ours(name: &str, blocks: &[Block]) -> Option<String> {
    let rename = |rest: &str, table: &[(&str, &str)]| {
        table.iter().find_map(|(theirs, ours)| Some(format!("{ours}{}", rest.strip_prefix(theirs)?)))
    };
    match name.strip_prefix("body.") {
        Some(rest) => {
            let (number, rest) = rest.split_once('.')?;
            let block = blocks.get(number.parse::<usize>().ok()?)?;
            Some(format!("{}{}", block.path, rename(rest, &BLOCK)?))
        }
        None => rename(name, &AROUND),
    }
}

/// Identity filters `(channels, channels, 1, 1)`: with stride 2 they take every second value, like the original's
/// pooling of size 1.
pub(in crate::models) fn identity_conv(channels: usize) -> Result<Tensor> {
    Tensor::eye(channels, DType::F32, &Device::Cpu)?.reshape((channels, channels, 1, 1))
}

/// A batch norm that returns its input unchanged in evaluation.
pub(in crate::models) fn identity_norm(channels: usize) -> Result<[(&'static str, Tensor); 5]> {
    let all = |value: f32| Tensor::full(value, channels, &Device::Cpu);
    Ok([
        ("weight", all(1.0)?),
        ("bias", all(0.0)?),
        ("running_mean", all(0.0)?),
        ("running_var", all(IDENTITY_VAR)?),
        (COUNTER, Tensor::new(0i64, &Device::Cpu)?),
    ])
}

#[cfg(test)]
mod tests {
    use candle_core::IndexOp;

    use super::*;
    use crate::nn::{Graph, Init, Layer, Params};
    use crate::ops::conv::ConvConfig;

    #[test]
    fn the_filled_shortcut_takes_every_second_value_bit_for_bit() -> Result<()> {
        let mut state = Tensors::from([("conv.weight".into(), identity_conv(6)?)]);
        state.extend(identity_norm(6)?.map(|(leaf, tensor)| (format!("norm.{leaf}"), tensor)));
        let mut params = Params::given(state, DType::F32, &Device::Cpu);
        let config = ConvConfig { stride: 2, ..Default::default() };
        let conv = Layer::conv2d([6, 6], 1, config, Init::Const(0.0), params.root().sub("conv"))?;
        let norm = Layer::batch_norm(6, params.root().sub("norm"))?;
        let mut graph = Graph::new();
        graph.chain(Graph::INPUT, [conv, norm]);
        params.finish()?;

        // Seven decades: a factor that is not exactly 1 shows in one of them.
        let value = |i: i32| (i as f32).sin() * 10f32.powi(i % 7 - 3);
        let x = Tensor::from_vec((0..2 * 8 * 8 * 6).map(value).collect::<Vec<_>>(), (2, 8, 8, 6), &Device::Cpu)?;
        let y = graph.forward_t(&params, &x.permute((0, 3, 1, 2))?, false)?;
        let bits =
            |t: &Tensor| Ok::<_, candle_core::Error>(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits));
        for h in 0..4 {
            for w in 0..4 {
                assert!(bits(&y.i((.., h, w))?)?.eq(bits(&x.i((.., 2 * h, 2 * w))?)?));
            }
        }
        Ok(())
    }
}
