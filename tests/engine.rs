//! The fused engine against candle's module in f64.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, ModuleT, Tensor};
use maskinv::models::{Arch, Model, ModelConfig};
use maskinv::nn::Params;
use maskinv::nn::engine::Activations;
use maskinv::testing::fill;

/// How far the gradient in f32 may be off, relative to its norm. Without PReLUs that turn it is 5e-6.
const GRADIENT: f64 = 1e-3;
/// How far that of one parameter may be: a single PReLU that turns between one rounding and another shows in a small
/// one.
const PARAMETER: f64 = 2e-2;

/// Small networks: with squeeze-excitation, with channels that fill no vectors.
fn configs() -> Vec<ModelConfig> {
    let base = ModelConfig { embedding_size: 32, width: 0.25, input_size: 32, ..ModelConfig::default() };
    let of = |arch| ModelConfig { arch, ..base.clone() };
    vec![
        of(Arch::R18),
        ModelConfig { input_size: 48, width: 0.5, ..of(Arch::R34) },
        ModelConfig { input_size: 112, ..of(Arch::Mbf) },
        ModelConfig { input_size: 64, ..of(Arch::MbfGdc) },
        ModelConfig { squeeze_excitation: true, ..of(Arch::R18) },
        ModelConfig { width: 0.17, embedding_size: 17, squeeze_excitation: true, ..of(Arch::R18) },
        ModelConfig { width: 0.11, embedding_size: 10, input_size: 64, ..of(Arch::MbfGdc) },
    ]
}

/// Whether a vector is a PReLU's: a norm's weight has a bias beside it.
fn is_slope(state: &BTreeMap<String, Tensor>, name: &str) -> bool {
    name.strip_suffix("weight").is_some_and(|path| !state.contains_key(&format!("{path}bias")))
}

/// The network in f32 and in f64, with weights in which no norm is trivial.
fn models(config: &ModelConfig) -> Result<[Model; 2]> {
    let single = Model::new(config, &Device::Cpu, 7)?;
    let mut state = single.params().state()?;
    // Slopes near 1: where a PReLU turns between one rounding and another, the gradient changes little.
    let slopes: Vec<String> = state.keys().filter(|name| is_slope(&state, name)).cloned().collect();
    for (name, tensor) in &mut state {
        let bounds = match name.rsplit('.').next().unwrap_or_default() {
            "running_mean" => (-0.2, 0.2),
            "running_var" => (0.5, 1.5),
            "weight" if tensor.rank() == 1 && slopes.contains(name) => (0.8, 1.2),
            "weight" if tensor.rank() == 1 && name != "features.weight" => (0.5, 1.5),
            "bias" => (-0.3, 0.3),
            _ => continue,
        };
        *tensor = fill(name, tensor.dims(), bounds.0, bounds.1)?.to_dtype(DType::F32)?;
    }
    single.params().load(&state)?;
    let double = Model::build(config, Params::new(DType::F64, &Device::Cpu, 7))?;
    double.params().load(&state)?;
    Ok([single, double])
}

/// The embeddings of candle's module, weights for them, and the gradients of their weighted sum.
fn layers(double: &Model, wide: &Tensor) -> Result<(Tensor, Tensor, GradStore)> {
    let embeddings = double.forward_t(wide, true)?;
    let weights = fill("gy", embeddings.dims(), -1.0, 1.0)?;
    let gradients = (&embeddings * &weights)?.sum_all()?.backward()?;
    Ok((embeddings, weights, gradients))
}

fn images(n: usize, side: usize) -> Result<[Tensor; 2]> {
    let x = fill("x", &[n, 3, side, side], -1.0, 1.0)?.to_dtype(DType::F32)?;
    Ok([x.clone(), x.to_dtype(DType::F64)?])
}

fn flat(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}

/// The norm of the difference, relative to that of `expected` or, if larger, to `scale`.
fn error(found: &[f64], expected: &[f64], scale: f64) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    difference / norm(&mut expected.iter().copied()).max(scale)
}

#[test]
fn inference_by_the_engine_equals_the_layers_in_f64() -> Result<()> {
    for config in configs() {
        let [single, double] = models(&config)?;
        let network = single.inference(2)?;
        for n in [1, 2, 5] {
            let [x, wide] = images(n, config.input_size)?;
            let (found, expected) = (flat(&network.run(&x)?)?, flat(&double.forward_t(&wide, false)?)?);
            let error = error(&found, &expected, 0.0);
            assert!(error <= 3e-5, "{config:?}, {n} images: {error:e}");
        }
        let [x, _] = images(2, config.input_size)?;
        let expected = flat(&network.run(&x)?)?;
        let owned = Model::frozen(&config, single.params().state()?, &Device::Cpu)?.into_inference(2)?;
        assert!(flat(&owned.run(&x)?)? == expected, "{config:?}");
    }
    Ok(())
}

/// 49 blocks deep, with every shape and tile of the full network; `-- --nocapture` shows the figures.
#[test]
fn the_embeddings_of_r100_are_those_of_f64() -> Result<()> {
    let config = ModelConfig { arch: Arch::R100, ..ModelConfig::default() };
    let [single, double] = models(&config)?;
    // As after training, no block adds much more than it gets: with the weights of a beginner 49 of them overflow.
    let mut state = single.params().state()?;
    for tensor in state.values_mut().filter(|tensor| tensor.rank() == 4) {
        let fan_in: usize = tensor.dims()[1..].iter().product();
        let std = tensor.sqr()?.mean_all()?.sqrt()?.to_scalar::<f32>()?;
        *tensor = (&*tensor * (0.45 / f64::from(std) / (fan_in as f64).sqrt()))?;
    }
    single.params().load(&state)?;
    double.params().load(&state)?;
    let [x, wide] = images(2, config.input_size)?;
    let expected = flat(&double.forward_t(&wide, false)?)?;
    for batch in [1, 16] {
        // The batch decides on the tiles.
        let network = single.inference(batch)?;
        let found = flat(&network.run(&x)?)?;
        for (found, expected) in found.chunks(512).zip(expected.chunks(512)) {
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let cosine = dot(found, expected) / (dot(found, found) * dot(expected, expected)).sqrt();
            println!("batch {batch}: cosine 1 - {:.1e}, error {:.1e}", 1.0 - cosine, error(found, expected, 0.0));
            assert!(1.0 - cosine <= 1e-9, "batch {batch}: 1 - {:e}", 1.0 - cosine);
        }
    }
    Ok(())
}

#[test]
fn training_by_the_engine_equals_the_layers_in_f64() -> Result<()> {
    for config in configs() {
        let [single, double] = models(&config)?;
        let mut training = single.into_training(Activations::Kept)?;
        let [x, wide] = images(8, config.input_size)?;
        let (expected, weights, expected_grads) = layers(&double, &wide)?;

        let (found, recorded) = training.record(&x)?;
        let off = error(&flat(&found)?, &flat(&expected)?, 0.0);
        assert!(off <= 1e-5, "{config:?}: {off:e}");
        recorded.backward(&weights.to_dtype(DType::F32)?)?;
        let grads = training.gradients()?;

        let largest = double.params().trainable().map(|(_, var)| flat(expected_grads.get(var).unwrap()));
        let largest = largest.collect::<Result<Vec<_>>>()?;
        let largest = largest.iter().map(|g| g.iter().map(|v| v * v).sum::<f64>().sqrt()).fold(0.0, f64::max);
        let mut all = [Vec::new(), Vec::new()];
        assert_eq!(grads.len(), double.params().trainable().count());
        for (name, var) in double.params().trainable() {
            let found = flat(&grads[name])?;
            let expected = flat(expected_grads.get(var).unwrap())?;
            // A bias that the next batch norm takes back has hardly a gradient: compared to the others' size.
            let off = error(&found, &expected, 1e-3 * largest);
            assert!(off <= PARAMETER, "{config:?}: gradient of {name}: {off:e}");
            all[0].extend(found);
            all[1].extend(expected);
        }
        let off = error(&all[0], &all[1], 0.0);
        println!("{}: error of the whole gradient {off:.1e}", config.arch.name());
        assert!(off <= GRADIENT, "{config:?}: the whole gradient: {off:e}");
        // Running statistics of both.
        let (a, b) = (training.model()?.params().state()?, double.params().state()?);
        for (name, tensor) in a.iter().filter(|(name, _)| name.contains("running") || name.contains("num_batches")) {
            let off = error(&flat(tensor)?, &flat(&b[name])?, 0.0);
            assert!(off <= 1e-5, "{config:?}: {name}: {off:e}");
        }
    }
    Ok(())
}

#[test]
fn training_with_frozen_statistics_equals_the_layers_in_f64() -> Result<()> {
    for config in [&configs()[0], &configs()[2]] {
        let [single, double] = models(config)?;
        for model in [&single, &double] {
            model.params().freeze_statistics(true);
        }
        let before = single.params().state()?;
        let [x, wide] = images(3, config.input_size)?;
        let (expected, weights, expected_grads) = layers(&double, &wide)?;
        let mut training = single.into_training(Activations::Kept)?;
        let (found, recorded) = training.record(&x)?;
        let off = error(&flat(&found)?, &flat(&expected)?, 0.0);
        assert!(off <= 1e-5, "{config:?}: {off:e}");
        recorded.backward(&weights.to_dtype(DType::F32)?)?;
        let grads = training.gradients()?;
        for (name, var) in double.params().trainable() {
            let found = flat(&grads[name])?;
            let off = error(&found, &flat(expected_grads.get(var).unwrap())?, 1e-6);
            assert!(off <= PARAMETER, "{config:?}: gradient of {name}: {off:e}");
        }
        let after = training.model()?.params().state()?;
        for (name, tensor) in &before {
            assert_eq!(flat(tensor)?, flat(&after[name])?, "{name}");
        }
    }
    Ok(())
}

/// Embeddings, gradients by name and the state after them, of two passes.
type Passes = (Vec<f32>, Vec<(String, Vec<f32>)>, BTreeMap<String, Vec<f64>>);

fn passes(config: &ModelConfig, recomputes: bool, frozen: &[String]) -> Result<Passes> {
    let [mut model, _] = models(config)?;
    model.freeze(frozen)?;
    let mut training = model.into_training(if recomputes { Activations::Recomputed } else { Activations::Kept })?;
    let (mut embeddings, mut gradients) = (Vec::new(), Vec::new());
    for n in [4, 3] {
        let [x, _] = images(n, config.input_size)?;
        let (embedding, recorded) = training.record(&x)?;
        recorded.backward(&fill("gy", embedding.dims(), -1.0, 1.0)?.to_dtype(DType::F32)?)?;
        embeddings.extend(embedding.flatten_all()?.to_vec1::<f32>()?);
        for (name, gradient) in training.gradients()? {
            gradients.push((name, gradient.flatten_all()?.to_vec1()?));
        }
    }
    let state = training.model()?.params().state()?.into_iter().map(|(name, tensor)| Ok((name, flat(&tensor)?)));
    Ok((embeddings, gradients, state.collect::<Result<_>>()?))
}

#[test]
fn a_pass_that_computes_activations_again_gives_the_same_bits() -> Result<()> {
    let dropping = ModelConfig { dropout: 0.4, ..configs()[0].clone() };
    for config in configs().into_iter().chain([dropping]) {
        let (kept, again) = (passes(&config, false, &[])?, passes(&config, true, &[])?);
        assert!(kept.1.len() > 20 && kept == again, "{config:?}");
    }
    Ok(())
}

#[test]
fn frozen_stages_stay_and_the_others_have_the_gradients_of_the_layers_in_f64() -> Result<()> {
    let config = &configs()[0];
    let stages = ["conv1", "bn1", "prelu", "layer1", "layer3.1.bn2"].map(str::to_owned);
    let [mut single, mut double] = models(config)?;
    single.freeze(&stages)?;
    double.freeze(&stages)?;
    let is_frozen = |name: &str| stages.iter().any(|stage| name.starts_with(&format!("{stage}.")));
    let before = single.params().state()?;
    let [x, wide] = images(6, config.input_size)?;
    let (expected, weights, expected_grads) = layers(&double, &wide)?;
    let error_of_freezing = single.freeze(&["layer9".to_owned()]).unwrap_err().to_string();
    let mut training = single.into_training(Activations::Kept)?;
    let (found, recorded) = training.record(&x)?;
    let off = error(&flat(&found)?, &flat(&expected)?, 0.0);
    assert!(off <= 1e-5, "{off:e}");
    recorded.backward(&weights.to_dtype(DType::F32)?)?;
    let grads = training.gradients()?;
    assert!(grads.keys().all(|name| !is_frozen(name)) && grads.len() > 20);
    for gradient in grads.values() {
        assert!(flat(gradient)?.iter().any(|g| *g != 0.0));
    }
    for (name, var) in double.params().trainable() {
        let found = flat(&grads[name])?;
        let off = error(&found, &flat(expected_grads.get(var).unwrap())?, 1e-2);
        assert!(off <= PARAMETER, "gradient of {name}: {off:e}");
    }
    let (after, doubles) = (training.model()?.params().state()?, double.params().state()?);
    for (name, tensor) in before.iter().filter(|(name, _)| name.contains("running") || name.contains("num_batches")) {
        assert_eq!(flat(tensor)? == flat(&after[name])?, is_frozen(name), "{name}");
        assert!(error(&flat(&after[name])?, &flat(&doubles[name])?, 1e-6) <= 1e-5, "{name}");
    }
    // Saved and loaded as before, and with less kept in memory the same.
    Model::new(config, &Device::Cpu, 0)?.params().load(&after)?;
    assert!(passes(config, false, &stages)? == passes(config, true, &stages)?);
    let error = error_of_freezing;
    assert!(error.contains("under \"layer9\"; there are bn2, fc, features, layer2"), "{error}");
    Ok(())
}

#[test]
fn a_network_in_f64_is_no_network_of_the_engine() -> Result<()> {
    let [single, double] = models(&configs()[0])?;
    let error = double.inference(2).unwrap_err().to_string();
    assert!(error.contains("forward_t runs other networks"), "{error}");
    let error = double.into_training(Activations::Kept).unwrap_err().to_string();
    assert!(error.contains("forward_t runs other networks"), "{error}");
    // As candle's module it takes images of its type only.
    assert!(single.forward_t(&images(2, 32)?[1], false).is_err());
    Ok(())
}

#[test]
fn the_engine_gives_the_same_bits_on_any_number_of_threads() -> Result<()> {
    for config in [&configs()[0], &configs()[2]] {
        let run = |threads: usize| -> Result<(Vec<f64>, Vec<Vec<f32>>)> {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build()?.install(|| {
                let [single, _] = models(config)?;
                let [x, _] = images(4, config.input_size)?;
                let mut all = flat(&single.inference(2)?.run(&x)?)?;
                let mut training = single.into_training(Activations::Kept)?;
                let (found, recorded) = training.record(&x)?;
                all.extend(flat(&found)?);
                recorded.backward(&fill("gy", found.dims(), -1.0, 1.0)?.to_dtype(DType::F32)?)?;
                let grads = training.gradients()?.into_values().map(|g| Ok(g.flatten_all()?.to_vec1()?));
                let grads = grads.collect::<Result<_>>()?;
                Ok((all, grads))
            })
        };
        let one = run(1)?;
        assert!(one == run(2)? && one == run(5)?, "{config:?}");
    }
    Ok(())
}

#[test]
fn images_of_another_size_are_refused() -> Result<()> {
    let config = &configs()[0];
    let [single, _] = models(config)?;
    let network = Model::frozen(config, single.params().state()?, &Device::Cpu)?.into_inference(2)?;
    let mut training = single.into_training(Activations::Kept)?;
    for dims in [&[1, 3, 31, 32][..], &[1, 1, 32, 32], &[3, 32, 32], &[0, 3, 32, 32]] {
        let x = Tensor::zeros(dims, DType::F32, &Device::Cpu)?;
        assert!(network.run(&x).is_err(), "{dims:?}");
        assert!(training.record(&x).is_err(), "{dims:?}");
    }
    let x = Tensor::zeros((1, 3, 32, 32), DType::F64, &Device::Cpu)?;
    let error = network.run(&x).unwrap_err().to_string();
    assert!(error.contains("expected f32 on the CPU"), "{error}");
    let (_, recorded) = training.record(&images(2, 32)?[0])?;
    let error = recorded.backward(&Tensor::zeros((2, 31), DType::F32, &Device::Cpu)?).unwrap_err().to_string();
    assert!(error.contains("expected a gradient (N, 32), found [2, 31]"), "{error}");
    Ok(())
}
