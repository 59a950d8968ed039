//! The losses and the optimiser against PyTorch. Fixtures: tests/fixtures/losses.py (torch 2.8.0, f64).

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use maskinv::losses::{
    DistillKind, MarginConfig, MarginGradient, MarginHead, MarginKind, PlusMatching, cosines, distillation_loss,
    match_margins,
};
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
