//! The losses and the optimiser against PyTorch. Fixtures: tests/fixtures/losses.py (torch 2.8.0, f64).

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use maskinv::losses::{
    DistillKind, MarginConfig, MarginHead, MarginKind, PlusMatching, cosines, distillation_loss, match_margins,
};
use maskinv::nn::{Gradients, Init, Params};
use maskinv::ops::cross_entropy::cross_entropy;
use maskinv::ops::margin::MarginGradient;
use maskinv::optim::{OptimConfig, OptimKind, Optimizer, grad_norm};
use maskinv::testing::{Tol, assert_close, fill};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::fixture::Fixture;

fn config(kind: MarginKind) -> MarginConfig {
    MarginConfig { kind, ..MarginConfig::default() }
}

/// Name and bounds of the fill that the margins come from.
type Drawn = (&'static str, f64, f64);

/// Name in the fixture, loss, drawn margins (none: the published constant).
fn published_losses() -> Vec<(&'static str, MarginConfig, Option<Drawn>)> {
    let arc = Some(("m", 0.4, 0.6));
    let cos = Some(("mc", 0.3, 0.4));
    let reference = |kind| MarginConfig { plus_matching: PlusMatching::Reference, ..config(kind) };
    let straight = MarginConfig { gradient: MarginGradient::StraightThrough, ..config(MarginKind::ArcFace) };
    vec![
        ("arcface", config(MarginKind::ArcFace), None),
        ("arcface_straight", straight, None),
        ("cosface", config(MarginKind::CosFace), None),
        ("elastic_arc", config(MarginKind::ElasticArc), arc),
        ("elastic_cos", config(MarginKind::ElasticCos), cos),
        ("elastic_arc_plus", config(MarginKind::ElasticArcPlus), arc),
        ("elastic_cos_plus", config(MarginKind::ElasticCosPlus), cos),
        ("elastic_arc_plus_published", reference(MarginKind::ElasticArcPlus), arc),
        ("elastic_cos_plus_published", reference(MarginKind::ElasticCosPlus), cos),
    ]
}

#[test]
fn margin_losses_match_pytorch() -> Result<()> {
    let f = Fixture::load("losses")?;
    let (labels, open): (Vec<i64>, Vec<i64>) = (f.json("labels")?, f.json("labels_open")?);
    for (name, config, margins) in published_losses() {
        let margins = match margins {
            Some((fill_name, lo, hi)) => fill(fill_name, &[8], lo, hi)?.to_vec1()?,
            None => vec![config.mean(); 8],
        };
        for prefix in ["", "near."] {
            let key = |what: &str| format!("{prefix}{name}.{what}");
            let e = if prefix.is_empty() { fill("e", &[8, 16], -1.0, 1.0)? } else { f.tensor("near.e")?.clone() };
            let (e, w) = (Var::from_tensor(&e)?, Var::from_tensor(&fill("w", &[16, 10], -1.0, 1.0)?)?);
            let cosine = cosines(&e, &w)?;
            let logits = config.logits(&cosine, &labels, &margins)?;
            assert_close(&key("logits"), &logits, f.tensor(&key("logits"))?, Tol::F64)?;
            if !name.ends_with("_published") {
                let expected = f.tensor(&key("logits_open"))?;
                assert_close(&key("logits_open"), &config.logits(&cosine, &open, &margins)?, expected, Tol::F64)?;
            }
            for loss in [cross_entropy(&logits, &labels)?, config.loss(&e, &w, &labels, &margins)?] {
                assert_close(&key("loss"), &loss, f.tensor(&key("loss"))?, Tol::F64)?;
                let grads = loss.backward()?;
                assert_close(&key("grad_e"), grads.get(&e).unwrap(), f.tensor(&key("grad_e"))?, Tol::F64)?;
                assert_close(&key("grad_w"), grads.get(&w).unwrap(), f.tensor(&key("grad_w"))?, Tol::F64)?;
            }
        }
    }
    Ok(())
}

#[test]
fn distillation_losses_match_pytorch() -> Result<()> {
    let f = Fixture::load("losses")?;
    let teacher = fill("ft", &[8, 16], -1.0, 1.0)?;
    for (name, kind) in
        [("mse", DistillKind::Mse), ("cosine", DistillKind::Cosine), ("relational", DistillKind::Relational)]
    {
        let student = Var::from_tensor(&fill("fs", &[8, 16], -1.0, 1.0)?)?;
        let loss = distillation_loss(&student, &teacher, kind)?;
        assert_close(name, &loss, f.tensor(&format!("distill_{name}.loss"))?, Tol::F64)?;
        let grads = loss.backward()?;
        assert_close(name, grads.get(&student).unwrap(), f.tensor(&format!("distill_{name}.grad"))?, Tol::F64)?;
    }
    Ok(())
}

#[test]
fn sgd_and_clipping_match_pytorch() -> Result<()> {
    let f = Fixture::load("sgd")?;
    for (file, max_norm) in [("params", None), ("params_clipped", Some(0.5))] {
        let mut params = Params::new(DType::F32, &Device::Cpu, 0);
        let p = params.root().param("p", 10, Init::Const(0.0))?;
        params.load(&[("p".to_owned(), fill("p", &[10], -1.0, 1.0)?)].into())?;
        let mut sgd = Optimizer::new(&params, &OptimConfig { lr: 0.1, weight_decay: 5e-4, ..OptimConfig::default() });
        for step in 0..3 {
            let g = fill(&format!("g{step}"), &[10], -1.0, 1.0)?.to_dtype(DType::F32)?;
            let store = (&p * g)?.sum_all()?.backward()?;
            let grads = Gradients::of(&params, &store)?;
            let norm = grad_norm(&grads)?;
            let expected = f.tensor("grad_norm")?.get(step)?.to_scalar::<f64>()?;
            assert!((norm - expected).abs() <= 1e-6, "norm {norm}, expected {expected}");
            let scale = max_norm.map_or(1.0, |max| maskinv::optim::clip_scale(norm, max));
            sgd.step(&grads, 0.1, scale)?;
            assert_close(&format!("{file} after step {step}"), &p, &f.tensor(file)?.get(step)?, Tol::F32)?;
        }
    }
    Ok(())
}

#[test]
fn adamw_matches_pytorch() -> Result<()> {
    let f = Fixture::load("adamw")?;
    let mut params = Params::new(DType::F32, &Device::Cpu, 0);
    let p = params.root().param("p", 10, Init::Const(0.0))?;
    params.load(&[("p".to_owned(), fill("p", &[10], -1.0, 1.0)?)].into())?;
    let config = OptimConfig { kind: OptimKind::AdamW, weight_decay: 0.05, ..OptimConfig::default() };
    let mut adamw = Optimizer::new(&params, &config);
    for step in 0..4 {
        let g = fill(&format!("g{step}"), &[10], -1.0, 1.0)?.to_dtype(DType::F32)?;
        let store = (&p * g)?.sum_all()?.backward()?;
        adamw.step(&Gradients::of(&params, &store)?, 0.01, 1.0)?;
        assert_close(&format!("after step {step}"), &p, &f.tensor("params")?.get(step)?, Tol::F32)?;
    }
    Ok(())
}

#[test]
fn a_parameter_without_gradient_is_named() -> Result<()> {
    let mut params = Params::new(DType::F32, &Device::Cpu, 0);
    let used = params.root().param("used", 2, Init::Const(1.0))?;
    params.root().sub("layer1").param("forgotten", 2, Init::Const(1.0))?;
    let store = used.sum_all()?.backward()?;
    let error = Gradients::of(&params, &store).unwrap_err().to_string();
    assert!(error.contains("1 trainable parameters received no gradient: layer1.forgotten"), "{error}");
    Ok(())
}

#[test]
fn ranked_margins_rise_as_cosines_fall() {
    let cosines = [Some(0.3), None, Some(-0.2), Some(0.9), Some(0.1)];
    let margins = [0.52, 9.0, 0.49, 0.55, 0.47];
    let matched = match_margins(&cosines, &margins, PlusMatching::Ranked);
    assert_eq!(matched, [0.49, 0.0, 0.55, 0.47, 0.52]);
}

#[test]
fn drawn_margins_have_the_stated_mean_and_deviation() {
    let config = MarginConfig::default();
    let draws = config.draw(20_000, &mut ChaCha8Rng::seed_from_u64(1));
    let mean = draws.iter().sum::<f64>() / 2e4;
    let std = (draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / 2e4).sqrt();
    assert!((mean - 0.5).abs() <= 2e-3 && (std - 0.05).abs() <= 2e-3, "{mean} {std}");
    assert!(self::config(MarginKind::ArcFace).draw(3, &mut ChaCha8Rng::seed_from_u64(1)) == [0.5; 3]);
}

#[test]
fn a_head_stays_finite_on_embeddings_that_equal_their_centres() -> Result<()> {
    for kind in [MarginKind::ArcFace, MarginKind::ElasticArc, MarginKind::ElasticArcPlus, MarginKind::ElasticCosPlus] {
        let head = MarginHead::new(&config(kind), 4, 4, &Device::Cpu, 0)?;
        let kernel = head.params().state()?["kernel"].clone();
        // Rows: the centre, its opposite, zero, far off.
        let rows = Tensor::stack(
            &[
                kernel.t()?.get(0)?,
                kernel.t()?.get(1)?.neg()?,
                kernel.t()?.get(2)?.zeros_like()?,
                (kernel.t()?.get(3)? * 1e6)?,
            ],
            0,
        )?;
        let e = Var::from_tensor(&rows)?;
        let loss = head.forward(&e, &[0, 1, 2, 3], &mut ChaCha8Rng::seed_from_u64(0))?;
        let grads = loss.backward()?;
        let finite =
            |g: &Tensor| -> Result<bool> { Ok(g.flatten_all()?.to_vec1::<f32>()?.iter().all(|g| g.is_finite())) };
        assert!(loss.to_scalar::<f32>()?.is_finite() && finite(grads.get(&e).unwrap())?, "{kind:?}");
        for (_, var) in head.params().trainable() {
            assert!(finite(grads.get(var).unwrap())?, "{kind:?}");
        }
    }
    Ok(())
}
