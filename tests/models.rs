//! The networks against PyTorch's, and their own bookkeeping. Fixtures: tests/fixtures/models.py (torch 2.8.0, f64).

use anyhow::Result;
use candle_core::{DType, Device, ModuleT, Tensor, Var};
use maskinv::models::{Arch, IResNetConfig, MobileFaceNetConfig, MobileFaceNetHead, Model, ModelConfig};
use maskinv::nn::{Graph, Params};
use maskinv::testing::{Tol, assert_close, fill};

use crate::fixture::Fixture;

#[derive(serde::Deserialize)]
struct Config {
    layers: Option<[usize; 4]>,
    blocks: Option<[usize; 4]>,
    scale: Option<usize>,
    width: f64,
    embedding: usize,
    #[serde(default)]
    squeeze_excitation: bool,
    #[serde(default)]
    head: String,
    n: usize,
    conv_gain: f64,
}

impl Config {
    fn build(&self, params: &mut Params) -> Result<Graph> {
        let scaled = |c: f64| (c * self.width) as usize;
        Ok(match (self.layers, self.blocks, self.scale) {
            (Some(layers), ..) => {
                let planes = [64.0, 128.0, 256.0, 512.0].map(scaled);
                let (embedding_size, squeeze_excitation) = (self.embedding, self.squeeze_excitation);
                let config =
                    IResNetConfig { layers, planes, embedding_size, input_size: 112, dropout: 0.0, squeeze_excitation };
                config.build(params.root())?
            }
            (None, Some(blocks), Some(scale)) => {
                let head = match self.head.as_str() {
                    "gdc" => MobileFaceNetHead::GlobalDepthwise,
                    _ => MobileFaceNetHead::Linear,
                };
                let (base, embedding_size) = (scaled(64.0), self.embedding);
                let config = MobileFaceNetConfig { blocks, scale, base, embedding_size, input_size: 112, head };
                config.build(params.root())?
            }
            _ => anyhow::bail!("the fixture names no network"),
        })
    }
}

/// Bounds of a parameter's fill by its kind, as models.py documents.
fn bounds(kind: char, dims: &[usize], gain: f64) -> (f64, f64) {
    let fan_in = dims.iter().skip(1).product::<usize>() as f64;
    match kind {
        'c' => (-gain * (6.0 / fan_in).sqrt(), gain * (6.0 / fan_in).sqrt()),
        'l' => (-(3.0 / dims[1] as f64).sqrt(), (3.0 / dims[1] as f64).sqrt()),
        'a' => (-0.1, 0.1),
        'w' => (0.5, 1.5),
        'b' => (-0.5, 0.5),
        'p' => (0.1, 0.4),
        _ => unreachable!("kind {kind}"),
    }
}

/// Loads the fixture's weights: nothing but names enters, so a wrong name or layout shows.
fn load_filled(params: &Params, names: &[String], kinds: &str, gain: f64) -> Result<()> {
    let mut state = params.state()?;
    for (name, tensor) in &mut state {
        let leaf = name.rsplit('.').next().unwrap_or_default();
        let (lo, hi) = match (names.iter().position(|n| n == name), leaf) {
            (Some(i), _) => bounds(kinds.chars().nth(i).unwrap(), tensor.dims(), gain),
            (None, "running_mean") => (-0.5, 0.5),
            (None, "running_var") => (0.5, 1.5),
            _ => continue,
        };
        *tensor = fill(name, tensor.dims(), lo, hi)?;
    }
    Ok(params.load(&state)?)
}

/// Entry `floor(k * n / count)` of the flat tensor for each `k`.
fn samples(t: &Tensor, count: usize) -> Result<Vec<f64>> {
    let flat = t.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    Ok((0..count).map(|k| flat[k * flat.len() / count]).collect())
}

fn norm(t: &Tensor) -> Result<f64> {
    Ok(t.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

fn dot(name: &str, t: &Tensor) -> Result<f64> {
    let weights = fill(&format!("dot.{name}"), t.dims(), -1.0, 1.0)?;
    Ok((t.to_dtype(DType::F64)? * weights)?.sum_all()?.to_scalar()?)
}

/// Compares everything in the fixture, in `dtype`; `tol` is relative to the largest gradient norm.
fn check(file: &str, prefix: &str, dtype: DType, tol: f64) -> Result<()> {
    let f = Fixture::load(file)?;
    let key = |name: &str| format!("{prefix}{name}");
    let config: Config = f.json(&key("config"))?;
    let (names, buffers): (Vec<String>, Vec<String>) = (f.json(&key("params"))?, f.json(&key("buffers"))?);
    let tol = Tol { abs: tol, rel: tol };

    let mut params = Params::new(dtype, &Device::Cpu, 0);
    let net = config.build(&mut params)?;
    let trainable: Vec<_> = params.trainable().map(|(name, _)| name).collect();
    assert_eq!(trainable, names, "the trainable parameters' names");
    load_filled(&params, &names, f.meta(&key("kinds"))?, config.conv_gain)?;
    let x = Var::from_tensor(&fill("x", &[config.n, 3, 112, 112], -1.0, 1.0)?.to_dtype(dtype)?)?;

    assert_close("y_eval", &net.forward_t(&params, &x, false)?, f.tensor(&key("y_eval"))?, tol)?;
    let y = net.forward_t(&params, &x, true)?;
    assert_close("y_train", &y, f.tensor(&key("y_train"))?, tol)?;

    let gy = fill("gy", y.dims(), -1.0, 1.0)?.to_dtype(dtype)?;
    let grads = (y * gy)?.sum_all()?.backward()?;
    let read = |name: &str| -> Result<Vec<f64>> { Ok(f.tensor(&key(name))?.flatten_all()?.to_vec1()?) };
    let (norms, dots, sampled) = (read("grad_norm")?, read("grad_dot")?, read("grad_sample")?);
    let num_samples = sampled.len() / norms.len();
    let largest = norms.iter().copied().fold(0.0, f64::max);
    // A gradient that is zero in exact arithmetic is rounding of the others: compared to their size.
    let close = |what: &str, actual: f64, expected: f64, scale: f64| {
        let bound = tol.rel * (scale + 1e-3 * largest);
        assert!(
            (actual - expected).abs() <= bound,
            "{what}: expected {expected:e}, found {actual:e} (bound {bound:e})"
        );
    };
    for (i, (name, var)) in params.trainable().enumerate() {
        let Some(grad) = grads.get(var) else { panic!("{name} received no gradient") };
        close(&format!("norm of {name}"), norm(grad)?, norms[i], norms[i]);
        close(&format!("dot of {name}"), dot(name, grad)?, dots[i], norms[i]);
        let expected = &sampled[i * num_samples..][..num_samples];
        // In f32 a PReLU whose input changes its sign moves single elements: eight are compared.
        let step = if dtype == DType::F32 { num_samples / 8 } else { 1 };
        for (actual, &expected) in samples(grad, num_samples)?.into_iter().zip(expected).step_by(step) {
            close(&format!("sample of {name}"), actual, expected, norms[i]);
        }
    }
    let gx = grads.get(&x).expect("the input is a variable");
    let gx_norm = read("gx_norm")?[0];
    close("norm of gx", norm(gx)?, gx_norm, gx_norm);
    close("dot of gx", dot("x", gx)?, read("gx_dot")?[0], gx_norm);
    for (actual, expected) in samples(gx, 64)?.into_iter().zip(read("gx_sample")?) {
        close("sample of gx", actual, expected, gx_norm);
    }

    let state = params.state()?;
    let (norms, sampled) = (read("buffer_norm")?, read("buffer_sample")?);
    for (i, name) in buffers.iter().enumerate() {
        let buffer = &state[name];
        let bound = tol.rel * norms[i].max(1.0);
        assert!(
            (norm(buffer)? - norms[i]).abs() <= bound,
            "{name}: expected norm {}, found {}",
            norms[i],
            norm(buffer)?
        );
        for (actual, expected) in samples(buffer, 8)?.into_iter().zip(&sampled[i * 8..]) {
            assert!((actual - expected).abs() <= bound, "{name}: expected {expected}, found {actual}");
        }
    }
    assert!(buffers.iter().all(|b| state.contains_key(b)));
    Ok(())
}

/// PyTorch's own f32 differs from its f64 by up to 7e-4 of a gradient's norm in these nets.
const F32_NET: f64 = 2e-3;

#[test]
fn iresnet18_matches_pytorch() -> Result<()> {
    check("iresnet18", "", DType::F64, 1e-9)?;
    check("iresnet18", "", DType::F32, F32_NET)
}

#[test]
fn iresnet100_matches_pytorch() -> Result<()> {
    check("iresnet100", "", DType::F64, 1e-9)?;
    check("iresnet100", "", DType::F32, F32_NET)
}

#[test]
fn iresnet_with_squeeze_excitation_matches_pytorch() -> Result<()> {
    check("iresnet_se", "", DType::F64, 1e-9)?;
    check("iresnet_se", "", DType::F32, F32_NET)
}

#[test]
fn mobilefacenet_matches_pytorch() -> Result<()> {
    check("mobilefacenet", "", DType::F64, 1e-9)?;
    check("mobilefacenet", "", DType::F32, F32_NET)
}

#[test]
fn mobilefacenet_with_global_depthwise_head_matches_pytorch() -> Result<()> {
    check("mobilefacenet", "gdc.", DType::F64, 1e-9)?;
    check("mobilefacenet", "gdc.", DType::F32, F32_NET)
}

#[test]
fn published_sizes_have_the_published_number_of_parameters() -> Result<()> {
    // Millions, of insightface's r18, r34, r50, r100 with 512-d embeddings; METHOD gives 65.1 M weights for r100.
    for (arch, millions) in [(Arch::R18, 24.0), (Arch::R34, 34.1), (Arch::R50, 43.6), (Arch::R100, 65.2)] {
        let model = Model::outline(&ModelConfig { arch, ..ModelConfig::default() })?;
        let found = model.params().num_parameters() as f64 / 1e6;
        assert!((found - millions).abs() <= 0.1, "{arch:?}: {found} M");
    }
    Ok(())
}

#[test]
fn the_same_seed_gives_the_same_weights_and_another_seed_others() -> Result<()> {
    let config = ModelConfig { arch: Arch::R18, width: 0.125, embedding_size: 16, ..ModelConfig::default() };
    let weights = |seed| -> Result<Vec<f32>> {
        let model = Model::new(&config, &Device::Cpu, seed)?;
        Ok(model.params().state()?["layer4.1.conv2.weight"].flatten_all()?.to_vec1()?)
    };
    assert_eq!(weights(3)?, weights(3)?);
    assert_ne!(weights(3)?, weights(4)?);
    Ok(())
}

#[test]
fn a_frozen_model_builds_no_graph() -> Result<()> {
    let config =
        ModelConfig { arch: Arch::Mbf, width: 0.125, embedding_size: 16, input_size: 48, ..ModelConfig::default() };
    let state = Model::new(&config, &Device::Cpu, 0)?.params().state()?;
    let model = Model::frozen(&config, state, &Device::Cpu)?;
    assert_eq!(model.params().trainable().count(), 0);
    let y = model.forward_t(&fill("x", &[2, 3, 48, 48], -1.0, 1.0)?.to_dtype(DType::F32)?, false)?;
    assert!(!y.track_op());
    Ok(())
}

#[test]
fn state_of_another_architecture_is_refused_with_names_and_shapes() -> Result<()> {
    let config = ModelConfig { arch: Arch::R18, width: 0.125, embedding_size: 16, ..ModelConfig::default() };
    let r18 = Model::new(&config, &Device::Cpu, 0)?;
    let r34 = Model::new(&ModelConfig { arch: Arch::R34, ..config.clone() }, &Device::Cpu, 0)?;
    let before = r18.params().state()?["conv1.weight"].clone();
    let error = r18.params().load(&r34.params().state()?).unwrap_err().to_string();
    assert!(error.contains("unexpected layer1.2.bn1.bias") && error.contains("more"), "{error}");
    let wide = Model::new(&ModelConfig { width: 0.25, ..config }, &Device::Cpu, 0)?;
    let error = r18.params().load(&wide.params().state()?).unwrap_err().to_string();
    assert!(error.contains("bn1.bias: expected [8], found [16]"), "{error}");
    assert_close("weights", &r18.params().state()?["conv1.weight"], &before, Tol { abs: 0.0, rel: 0.0 })?;
    Ok(())
}

#[test]
fn a_wrong_image_size_is_refused() -> Result<()> {
    let config = ModelConfig { arch: Arch::R18, width: 0.125, embedding_size: 16, ..ModelConfig::default() };
    let model = Model::new(&config, &Device::Cpu, 0)?;
    let x = Tensor::zeros((1, 3, 96, 112), DType::F32, &Device::Cpu)?;
    let error = model.forward_t(&x, false).unwrap_err().to_string();
    assert!(error.contains("expected images (N, 3, 112, 112), found [1, 3, 96, 112]"), "{error}");
    Ok(())
}
