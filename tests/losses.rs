//! The losses and the optimiser against PyTorch. Fixtures: tests/fixtures/losses.py (torch 2.15.0, f64).

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use maskinv::losses::{
    DistillKind, MarginConfig, MarginGradient, MarginHead, MarginKind, PlusMatching, cosines, distillation_loss,
    match_margins, pull_centres,
};
use maskinv::ops::distance::distance_with_gradient;
use maskinv::testing::{Tol, assert_close, fill};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::fixture::Fixture;
use crate::margin_reference::{cross_entropy, logits};

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
            let of_labels = logits(&config, &cosine, &labels, &margins)?;
            assert_close(&key("logits"), &of_labels, f.tensor(&key("logits"))?, Tol::F64)?;
            if !name.ends_with("_published") {
                let expected = f.tensor(&key("logits_open"))?;
                assert_close(&key("logits_open"), &logits(&config, &cosine, &open, &margins)?, expected, Tol::F64)?;
            }
            for loss in [cross_entropy(&of_labels, &labels)?, config.loss(&e, &w, &labels, &margins)?] {
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
    for (name, kind) in [
        ("mse", DistillKind::Mse),
        ("cosine", DistillKind::Cosine),
        ("angular", DistillKind::Angular),
        ("relational", DistillKind::Relational),
    ] {
        let student = Var::from_tensor(&fill("fs", &[8, 16], -1.0, 1.0)?)?;
        let loss = distillation_loss(&student, &teacher, kind)?;
        assert_close(name, &loss, f.tensor(&format!("distill_{name}.loss"))?, Tol::F64)?;
        let grads = loss.backward()?;
        assert_close(name, grads.get(&student).unwrap(), f.tensor(&format!("distill_{name}.grad"))?, Tol::F64)?;
    }
    Ok(())
}

#[test]
fn distances_weighted_by_rows_match_pytorch() -> Result<()> {
    let f = Fixture::load("losses")?;
    let values = |name: &str| -> Result<Vec<f64>> { Ok(fill(name, &[8, 16], -1.0, 1.0)?.flatten_all()?.to_vec1()?) };
    let (student, teacher) = (values("fs")?, values("ft")?);
    let weights: Vec<f64> = fill("dw", &[8], 0.5, 1.5)?.to_vec1()?;
    let weights: Vec<f32> = weights.into_iter().map(|weight| weight as f32).collect();
    for (name, kind) in [("weighted_mse", DistillKind::Mse), ("weighted_angular", DistillKind::Angular)] {
        let (loss, gradient) = distance_with_gradient(&student, &teacher, 8, kind, 3.0, Some(&weights))?;
        let gradient = (Tensor::from_vec(gradient, (8, 16), &Device::Cpu)? / 3.0)?;
        let loss = Tensor::new(loss, &Device::Cpu)?;
        // The weights are f32.
        assert_close(name, &loss, f.tensor(&format!("distill_{name}.loss"))?, Tol::F32)?;
        assert_close(name, &gradient, f.tensor(&format!("distill_{name}.grad"))?, Tol::F32)?;
    }
    assert!(distance_with_gradient(&student, &teacher, 8, DistillKind::Relational, 1.0, Some(&weights)).is_err());
    assert!(distance_with_gradient(&student, &teacher, 8, DistillKind::Mse, 1.0, Some(&weights[..7])).is_err());
    Ok(())
}

/// At equal and at opposite directions, and without a direction at all.
#[test]
fn distances_and_gradients_are_finite_everywhere() -> Result<()> {
    let teacher = [0.6f32, -0.8, 0.6, -0.8, 0.6, -0.8, 0.6, -0.8];
    let student = [0.6f32, -0.8, -1.2, 1.6, 0.0, 0.0, 0.600_001, -0.8];
    for kind in [DistillKind::Mse, DistillKind::Cosine, DistillKind::Angular, DistillKind::Relational] {
        let (loss, gradient) = distance_with_gradient(&student, &teacher, 4, kind, 1.0, None)?;
        assert!(loss.is_finite() && gradient.iter().all(|g| g.is_finite()), "{kind:?}: {loss} {gradient:?}");
        if kind != DistillKind::Relational {
            assert!(gradient[..2].iter().all(|g| g.abs() < 1e-6), "{kind:?}: {gradient:?}");
        }
    }
    let (opposite, _) = distance_with_gradient(&[-1.0f64, 0.0], &[2.0, 0.0], 1, DistillKind::Angular, 1.0, None)?;
    assert!((opposite - std::f64::consts::PI.powi(2)).abs() < 1e-9, "{opposite}");
    Ok(())
}

#[test]
fn pulled_centres_match_pytorch() -> Result<()> {
    let f = Fixture::load("losses")?;
    let labels: Vec<i64> = f.json("labels_open")?;
    let values = |name: &str, shape: &[usize]| -> Result<Vec<f32>> {
        Ok(fill(name, shape, -1.0, 1.0)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    };
    let (mut centres, teacher) = (values("w", &[16, 10])?, values("ft", &[8, 16])?);
    let mut student = values("fs", &[8, 16])?;
    student[32..48].copy_from_slice(&teacher[32..48]);
    pull_centres(&mut centres, &student, &teacher, &labels)?;
    let found = Tensor::from_vec(centres.clone(), (16, 10), &Device::Cpu)?.to_dtype(DType::F64)?;
    assert_close("pulled", &found, f.tensor("pulled")?, Tol::F32)?;
    // A student that diverged leaves the centres as they are.
    let before = centres.clone();
    pull_centres(&mut centres, &vec![f32::NAN; 128], &teacher, &labels)?;
    assert_eq!(centres, before);
    assert!(pull_centres(&mut centres, &student, &teacher, &[10, 0, 0, 0, 0, 0, 0, 0]).is_err());
    assert!(pull_centres(&mut centres[1..], &student, &teacher, &labels).is_err());
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
