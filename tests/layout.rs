//! Checkpoints under other names against PyTorch, and what is refused. Fixture: tests/fixtures/layout.py (torch 2.8.0).

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{DType, Device, ModuleT, Tensor};
use maskinv::models::{Arch, Found, Layout, Model, ModelConfig, recognise};
use maskinv::preprocessing::Preprocessing;
use maskinv::testing::{Tol, assert_close, fill};

use crate::fixture::Fixture;

type Tensors = BTreeMap<String, Tensor>;

/// The checkpoint `net` of the fixture in f64, from its names, shapes and kinds.
fn checkpoint(f: &Fixture, net: &str) -> Result<Tensors> {
    let names: Vec<(String, Vec<usize>, char)> = f.json(net)?;
    let gain: f64 = f.json(&format!("{net}.conv_gain"))?;
    let one = |(name, dims, kind): (String, Vec<usize>, char)| {
        let fan_in = dims.iter().skip(1).product::<usize>() as f64;
        let (lo, hi) = match kind {
            'n' => return Ok((name, Tensor::new(7i64, &Device::Cpu)?)),
            'c' => (-gain * (6.0 / fan_in).sqrt(), gain * (6.0 / fan_in).sqrt()),
            'l' => (-(3.0 / fan_in).sqrt(), (3.0 / fan_in).sqrt()),
            'a' => (-0.1, 0.1),
            'p' => (0.1, 0.4),
            'b' | 'm' => (-0.5, 0.5),
            'w' | 'v' => (0.5, 1.5),
            _ => anyhow::bail!("kind {kind} of {name}"),
        };
        let tensor = fill(&name, &dims, lo, hi)?;
        Ok((name, tensor))
    };
    names.into_iter().map(one).collect()
}

fn f32s(tensors: &Tensors) -> Result<Tensors> {
    let convert = |(name, t): (&String, &Tensor)| {
        let t = if t.dtype() == DType::F64 { t.to_dtype(DType::F32)? } else { t.clone() };
        Ok((name.clone(), t))
    };
    tensors.iter().map(convert).collect()
}

fn prefixed(tensors: &Tensors, prefix: &str) -> Tensors {
    tensors.iter().map(|(name, t)| (format!("{prefix}{name}"), t.clone())).collect()
}

fn embed(recognised: &Found, x: &Tensor, dtype: DType) -> Result<Tensor> {
    let model = recognised.clone().build(dtype, &Device::Cpu)?;
    Ok(model.forward_t(&x.to_dtype(dtype)?, false)?)
}

/// The filled variance of an identity is the nearest f32, whatever the rest is computed in.
const F64_NET: Tol = Tol { abs: 1e-6, rel: 1e-6 };
/// PyTorch's own f32 lies as far from its f64 in nets of this depth, see models.rs.
const F32_NET: Tol = Tol { abs: 2e-3, rel: 2e-3 };

fn parity(net: &str, x: &Tensor, layout: Layout, config: &ModelConfig) -> Result<()> {
    let f = Fixture::load("layout")?;
    let tensors = checkpoint(&f, net)?;
    let y = f.tensor(&format!("{net}.y"))?;
    let recognised = recognise(tensors.clone())?;
    assert_eq!((recognised.layout, &recognised.config), (layout, config));
    assert_close("embeddings in f64", &embed(&recognised, x, DType::F64)?, y, F64_NET)?;
    assert_close("embeddings in f32", &embed(&recognise(f32s(&tensors)?)?, x, DType::F32)?, y, F32_NET)?;
    Ok(())
}

fn narrow(arch: Arch, width: f64, input_size: usize) -> ModelConfig {
    ModelConfig { arch, embedding_size: 16, width, input_size, ..ModelConfig::default() }
}

#[test]
fn ir18_of_cvlface_matches_pytorch() -> Result<()> {
    let x = fill("x.ir18", &[2, 3, 32, 32], -1.0, 1.0)?;
    parity("ir18", &x, Layout::CvlFace, &narrow(Arch::R18, 1.0 / 16.0, 32))
}

#[test]
fn ir50_of_cvlface_matches_pytorch() -> Result<()> {
    let x = fill("x.ir50", &[2, 3, 112, 112], -1.0, 1.0)?;
    parity("ir50", &x, Layout::CvlFace, &narrow(Arch::R50, 1.0 / 16.0, 112))
}

#[test]
fn ir_se18_of_cvlface_matches_pytorch() -> Result<()> {
    let x = fill("x.ir_se18", &[2, 3, 48, 48], -1.0, 1.0)?;
    let config = ModelConfig { squeeze_excitation: true, ..narrow(Arch::R18, 0.25, 48) };
    parity("ir_se18", &x, Layout::CvlFace, &config)
}

#[test]
fn mxnet_network_matches_pytorch_and_brings_its_normalisation() -> Result<()> {
    let pixels = fill("x.mxnet18", &[2, 3, 112, 112], 0.0, 255.0)?;
    let found = recognise(checkpoint(&Fixture::load("layout")?, "mxnet18")?)?;
    let expected = Preprocessing { mean: 127.5, std: 128.0, ..Preprocessing::default() };
    assert_eq!(found.preprocessing, Some(expected.clone()));
    let x = ((pixels - expected.mean)? / expected.std)?;
    parity("mxnet18", &x, Layout::MxNet, &narrow(Arch::R18, 0.125, 112))
}

#[test]
fn argument_marks_of_mxnet_files_are_understood() -> Result<()> {
    let plain = checkpoint(&Fixture::load("layout")?, "mxnet18")?;
    let mark = |name: &str| if name.contains("moving") { "aux:" } else { "arg:" };
    let marked = plain.iter().map(|(name, t)| (format!("{}{name}", mark(name)), t.clone())).collect();
    let (plain, marked) = (recognise(plain)?, recognise(marked)?);
    assert!(plain.tensors.keys().eq(marked.tensors.keys()));
    marked.build(DType::F32, &Device::Cpu)?;
    Ok(())
}

#[test]
fn prefixes_of_wrappers_are_taken_off_in_any_order() -> Result<()> {
    let f = Fixture::load("layout")?;
    let plain = f32s(&checkpoint(&f, "ir18")?)?;
    let expected = recognise(plain.clone())?;
    assert!(!expected.notes.iter().any(|note| note.contains("prefix")), "{:?}", expected.notes);
    for prefix in ["module.", "model.net.", "net.model.", "_orig_mod.module.backbone.", "student."] {
        let found = recognise(prefixed(&plain, prefix))?;
        assert!(found.tensors.keys().eq(expected.tensors.keys()));
        assert_eq!(found.config, expected.config);
        let note = format!("every name of the network has the prefix {prefix}: removed");
        assert!(found.notes.contains(&note), "{:?}", found.notes);
    }
    Ok(())
}

#[test]
fn what_lies_beside_a_network_is_left_out_but_for_another_network() -> Result<()> {
    let mut tensors = prefixed(&f32s(&checkpoint(&Fixture::load("layout")?, "ir18")?)?, "model.");
    for name in ["head.kernel", "head.t", "head.batch_mean", "head.batch_std"] {
        tensors.insert(name.into(), Tensor::zeros(1, DType::F32, &Device::Cpu)?);
    }
    let found = recognise(tensors.clone())?;
    let note = "what lies beside the network is left out: head.batch_mean, head.batch_std, head.kernel, head.t";
    assert!(found.notes.iter().any(|n| n == note), "{:?}", found.notes);
    found.build(DType::F32, &Device::Cpu)?;

    let count = tensors.len() - 4;
    tensors.insert("teacher.input_layer.0.weight".into(), Tensor::zeros(1, DType::F32, &Device::Cpu)?);
    let error = recognise(tensors).unwrap_err().to_string();
    let expected = format!("{count} of {} tensors begin with model., teacher.input_layer.0.weight does not", count + 5);
    assert!(error.contains(&expected), "{error}");
    Ok(())
}

#[test]
fn missing_unexpected_and_misshapen_tensors_are_one_error() -> Result<()> {
    let mut tensors = f32s(&checkpoint(&Fixture::load("layout")?, "ir18")?)?;
    let zeros = |n: usize| Tensor::zeros(n, DType::F32, &Device::Cpu);
    tensors.remove("body.3.res_layer.2.bias");
    tensors.remove("body.5.res_layer.1.num_batches_tracked");
    tensors.remove("body.5.res_layer.5.num_batches_tracked");
    tensors.insert("body.3.res_layer.3.weight".into(), zeros(9)?);
    tensors.insert("body.3.res_layer.6.weight".into(), zeros(8)?);
    tensors.insert("output_layer.5.weight".into(), zeros(8)?);
    let error = recognise(tensors)?.build(DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(error.starts_with("5 tensors do not fit"), "{error}");
    for part in [
        "missing layer2.1.bn2.bias",
        "missing layer3.1.bn3.num_batches_tracked",
        "layer2.1.prelu.weight: expected [8], found [9]",
        "unexpected body.3.res_layer.6.weight",
        "unexpected output_layer.5.weight",
    ] {
        assert!(error.contains(part), "{part} in: {error}");
    }
    Ok(())
}

#[test]
fn two_tensors_of_one_meaning_are_refused() -> Result<()> {
    let mut tensors = f32s(&checkpoint(&Fixture::load("layout")?, "ir18")?)?;
    tensors.insert("fc.bias".into(), Tensor::zeros(16, DType::F32, &Device::Cpu)?);
    let error = recognise(tensors).unwrap_err().to_string();
    assert!(error.contains("two tensors are fc.bias"), "{error}");
    Ok(())
}

#[test]
fn counters_that_are_missing_everywhere_are_zero() -> Result<()> {
    let mut tensors = f32s(&checkpoint(&Fixture::load("layout")?, "ir18")?)?;
    tensors.retain(|name, _| !name.ends_with("num_batches_tracked"));
    let found = recognise(tensors)?;
    assert!(found.notes.iter().any(|n| n.contains("num_batches_tracked")), "{:?}", found.notes);
    let model = found.build(DType::F32, &Device::Cpu)?;
    assert_eq!(model.params().state()?["layer4.1.bn3.num_batches_tracked"].to_scalar::<i64>()?, 0);
    Ok(())
}

#[test]
fn half_precision_becomes_f32_and_integers_are_refused() -> Result<()> {
    let f = Fixture::load("layout")?;
    let (full, x) = (checkpoint(&f, "ir18")?, fill("x.ir18", &[2, 3, 32, 32], -1.0, 1.0)?);
    for dtype in [DType::F16, DType::BF16] {
        let mut half = full.clone();
        for (_, t) in half.iter_mut().filter(|(_, t)| t.dtype() == DType::F64) {
            *t = t.to_dtype(dtype)?;
        }
        let found = recognise(half)?;
        assert!(found.tensors.iter().all(|(n, t)| t.dtype() == DType::F32 || n.ends_with("num_batches_tracked")));
        assert!(found.notes.iter().any(|n| n.contains("half precision")), "{:?}", found.notes);
        // bf16 has a mantissa of 8 bits.
        assert_close("embeddings", &embed(&found, &x, DType::F32)?, f.tensor("ir18.y")?, Tol { abs: 0.1, rel: 0.1 })?;
    }
    let mut tensors = full;
    tensors.insert("body.0.res_layer.1.weight".into(), Tensor::zeros((4, 4, 3, 3), DType::U8, &Device::Cpu)?);
    let error = recognise(tensors).unwrap_err().to_string();
    assert!(error.contains("body.0.res_layer.1.weight: expected floating-point numbers, found U8"), "{error}");
    Ok(())
}

/// Every architecture under our own names is found again, with all its sizes.
#[test]
fn our_own_names_give_back_the_config() -> Result<()> {
    for arch in Arch::ALL {
        let is_mbf = matches!(arch, Arch::Mbf | Arch::MbfGdc);
        let config = ModelConfig { squeeze_excitation: arch == Arch::R34, ..narrow(arch, 3.0 / 64.0, 48) };
        let tensors = Model::outline(&config)?.params().state()?;
        let found = recognise(prefixed(&tensors, "module."))?;
        assert_eq!(found.config, config);
        assert_eq!(found.layout, if is_mbf { Layout::MobileFaceNet } else { Layout::IResNet });
        found.clone().build(DType::F32, &Device::Cpu)?;
        assert!(found.tensors.keys().eq(tensors.keys()));
    }
    Ok(())
}

/// Names and shapes of CVLface's IR network, values nowhere: one zero seen as every shape.
fn ir(units: [usize; 4], channels: usize, inputs: usize, embedding: usize) -> Result<Tensors> {
    let mut tensors = Tensors::new();
    let zero = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    let mut put = |name: String, dims: &[usize]| -> Result<()> {
        tensors.insert(name, zero.broadcast_as(dims)?);
        Ok(())
    };
    let stats = ["running_mean", "running_var"];
    let affine = ["weight", "bias", "running_mean", "running_var"];
    let norm = |put: &mut dyn FnMut(String, &[usize]) -> Result<()>, name: &str, c: usize, leaves: &[&str]| {
        leaves.iter().try_for_each(|leaf| put(format!("{name}.{leaf}"), &[c]))?;
        put(format!("{name}.num_batches_tracked"), &[])
    };
    put("input_layer.0.weight".into(), &[channels, 3, 3, 3])?;
    norm(&mut put, "input_layer.1", channels, &affine)?;
    put("input_layer.2.weight".into(), &[channels])?;
    let (mut c_in, mut block) = (channels, 0);
    for (stage, count) in units.into_iter().enumerate() {
        let c = channels << stage;
        for _ in 0..count {
            let path = format!("body.{block}");
            norm(&mut put, &format!("{path}.res_layer.0"), c_in, &affine)?;
            put(format!("{path}.res_layer.1.weight"), &[c, c_in, 3, 3])?;
            norm(&mut put, &format!("{path}.res_layer.2"), c, &affine)?;
            put(format!("{path}.res_layer.3.weight"), &[c])?;
            put(format!("{path}.res_layer.4.weight"), &[c, c, 3, 3])?;
            norm(&mut put, &format!("{path}.res_layer.5"), c, &affine)?;
            if c_in != c {
                put(format!("{path}.shortcut_layer.0.weight"), &[c, c_in, 1, 1])?;
                norm(&mut put, &format!("{path}.shortcut_layer.1"), c, &affine)?;
            }
            (c_in, block) = (c, block + 1);
        }
    }
    norm(&mut put, "output_layer.0", c_in, &affine)?;
    put("output_layer.3.weight".into(), &[embedding, inputs])?;
    put("output_layer.3.bias".into(), &[embedding])?;
    norm(&mut put, "output_layer.4", embedding, &stats)?;
    Ok(tensors)
}

#[test]
fn the_published_ir101_is_r100_name_by_name_and_shape_by_shape() -> Result<()> {
    let found = recognise(prefixed(&ir([3, 13, 30, 3], 64, 512 * 7 * 7, 512)?, "model.net."))?;
    assert_eq!(found.config, ModelConfig::default());
    let config = narrow(Arch::R100, 1.0 / 64.0, 112);
    let names = Model::outline(&config)?.params().state()?;
    assert!(found.tensors.keys().eq(names.keys()));
    // The published pretrained_model/model.pt (minchul/cvlface_adaface_ir101_webface12m) has 261,111,273 bytes: f32,
    // counters of 8 bytes, and some hundred bytes of zip and pickle for each tensor.
    let tensors = ir([3, 13, 30, 3], 64, 512 * 7 * 7, 512)?;
    let counters = tensors.keys().filter(|name| name.ends_with("num_batches_tracked")).count();
    let bytes = 4 * tensors.values().map(Tensor::elem_count).sum::<usize>() + 4 * counters;
    let rest = 261_111_273 - bytes;
    assert!((100 * tensors.len()..400 * tensors.len()).contains(&rest), "{rest} bytes for {} tensors", tensors.len());
    Ok(())
}

#[test]
fn sizes_that_no_network_has_are_refused_with_what_was_found() -> Result<()> {
    let refused = |tensors: Result<Tensors>, part: &str| -> Result<()> {
        let error = recognise(tensors?).unwrap_err().to_string();
        assert!(error.contains(part), "{part} in: {error}");
        Ok(())
    };
    refused(
        ir([2, 2, 3, 2], 4, 32 * 4, 16),
        "the stages have [2, 2, 3, 2] blocks; supported are [2, 2, 2, 2], [3, 4, 6, 3]",
    )?;
    refused(ir([2, 2, 2, 2], 256, 2048 * 49, 16), "conv1.weight: expected (1 to 128, 3, 3, 3), found [256, 3, 3, 3]")?;
    refused(ir([2, 2, 2, 2], 4, 32 * 5, 16), "fc.weight: 160 inputs are not 32 channels of a square map")?;
    let without = |name: &str, tensors: Result<Tensors>| {
        tensors.map(|t| t.into_iter().filter(|(n, _)| !n.starts_with(name)).collect::<Tensors>())
    };
    refused(without("body.5.", ir([2, 2, 2, 2], 4, 128, 16)), "body.: expected blocks from 0 to 7, found {0, 1, 2, 3")?;
    refused(without("output_layer.3.weight", ir([2, 2, 2, 2], 4, 128, 16)), "no tensor fc.weight")?;
    // Bottlenecks, and blocks with one batch norm less.
    let mut tensors = ir([2, 2, 2, 2], 4, 128, 16)?;
    tensors.insert("body.0.res_layer.8.running_mean".into(), Tensor::zeros(4, DType::F32, &Device::Cpu)?);
    refused(Ok(tensors), "blocks of three convolutions")?;
    let mut tensors = ir([2, 2, 2, 2], 4, 128, 16)?;
    tensors.remove("body.0.res_layer.2.running_mean");
    tensors.insert("body.0.res_layer.4.running_mean".into(), Tensor::zeros(4, DType::F32, &Device::Cpu)?);
    refused(Ok(tensors), "without a batch norm after the first convolution")
}

#[test]
fn the_large_mobilefacenet_is_refused_with_its_sizes() -> Result<()> {
    let tensors = Model::outline(&narrow(Arch::MbfGdc, 0.125, 48))?.params().state()?;
    let mut more = tensors.clone();
    for (name, tensor) in &tensors {
        if let Some(rest) = name.strip_prefix("layers.5.layers.0.") {
            more.insert(format!("layers.5.layers.6.{rest}"), tensor.clone());
        }
    }
    let error = recognise(more).unwrap_err().to_string();
    assert!(error.contains("found [1, 4, 7, 2] blocks") && error.contains("supported is mbf"), "{error}");
    let mut wide = tensors;
    wide.insert("layers.0.layers.0.weight".into(), Tensor::zeros((32, 3, 3, 3), DType::F32, &Device::Cpu)?);
    let error = recognise(wide).unwrap_err().to_string();
    assert!(error.contains("a first convolution [32, 3, 3, 3]"), "{error}");
    Ok(())
}

#[test]
fn squeeze_excitation_of_mxnet_is_refused() -> Result<()> {
    let mut tensors = checkpoint(&Fixture::load("layout")?, "mxnet18")?;
    tensors.insert("stage1_unit1_se_conv1_weight".into(), Tensor::zeros((1, 8, 1, 1), DType::F32, &Device::Cpu)?);
    let error = recognise(tensors).unwrap_err().to_string();
    assert!(error.contains("squeeze-excitation with biases"), "{error}");
    Ok(())
}

#[test]
fn unknown_layouts_are_refused_with_names_found_and_layouts_known() -> Result<()> {
    let named = |names: &[&str]| -> Result<String> {
        let one = |name: &&str| Ok(((*name).to_owned(), Tensor::zeros(1, DType::F32, &Device::Cpu)?));
        Ok(recognise(names.iter().map(one).collect::<Result<_>>()?).unwrap_err().to_string())
    };
    let foamliu = ["bn.bias", "conv1.0.weight", "dw_conv.depthwise.weight", "features.0.conv.0.0.weight"];
    let error = named(&[&foamliu[..], &["gdconv.depthwise.weight"]].concat())?;
    assert!(error.contains("this is foamliu's MobileFaceNet"), "{error}");
    assert!(error.contains("found 5 tensors: bn.bias, conv1.0.weight, dw_conv.depthwise.weight"), "{error}");
    for layout in [Layout::IResNet, Layout::MobileFaceNet, Layout::CvlFace, Layout::MxNet] {
        assert!(error.contains(&layout.to_string()), "{layout} in: {error}");
    }
    assert!(named(&["net.pos_embed", "net.patch_embed.proj.weight"])?.contains("this is a vision transformer"));
    assert!(named(&["conv1.weight", "layer1.0.conv1.weight"])?.contains("this is a ResNet without"));
    assert!(named(&["a", "b"])?.contains("the layout of the tensors is unknown"));
    assert!(named(&[])?.contains("found 0 tensors"));
    Ok(())
}
