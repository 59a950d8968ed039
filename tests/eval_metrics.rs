//! Metrics and the ten-fold protocol against tests/fixtures/eval.py (numpy 2.2.6, scipy 1.17.1, scikit-learn 1.9.1).

use maskinv::eval::{Scores, fold_accuracy, fold_tar_at_far, squared_l2};
use maskinv::{Error, Result};
use safetensors::SafeTensors;

const FIXTURE: &[u8] = include_bytes!("fixtures/eval.safetensors");
/// Means and deviations are summed in another order than numpy's.
const TOLERANCE: f64 = 1e-12;

fn f64s(file: &SafeTensors, name: &str) -> Vec<f64> {
    let bytes = file.tensor(name).expect("the fixture has it").data();
    bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes"))).collect()
}

fn bools(file: &SafeTensors, name: &str) -> Vec<bool> {
    file.tensor(name).expect("the fixture has it").data().iter().map(|&b| b != 0).collect()
}

fn assert_close(found: &[f64], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= TOLERANCE * e.abs().max(1.0), "{what}[{i}]: expected {e}, found {f}");
    }
}

fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
    match result {
        Err(Error::Evaluation(what)) => what,
        other => panic!("expected an evaluation error, found {other:?}"),
    }
}

#[test]
fn fold_accuracy_matches_insightface() -> Result<()> {
    let file = SafeTensors::deserialize(FIXTURE).expect("a valid fixture");
    for (name, num_folds) in [("blocks", 10), ("alternating", 10), ("ties", 7), ("opposite", 3)] {
        let get = |key: &str| f64s(&file, &format!("fold.{name}.{key}"));
        let is_same = bools(&file, &format!("fold.{name}.is_same"));
        let found = fold_accuracy(&get("distances"), &is_same, num_folds)?;
        assert_eq!(found.thresholds, get("threshold"), "{name}");
        assert_eq!(found.accuracies, get("accuracy"), "{name}");
        assert_close(&[found.mean, found.std], &get("accuracy_mean_std"), name);
    }
    Ok(())
}

#[test]
fn fold_tar_matches_insightface() -> Result<()> {
    let file = SafeTensors::deserialize(FIXTURE).expect("a valid fixture");
    for (name, num_folds) in [("blocks", 10), ("alternating", 10), ("ties", 7), ("opposite", 3)] {
        let is_same = bools(&file, &format!("fold.{name}.is_same"));
        for (i, far_target) in [1e-3, 1e-2].into_iter().enumerate() {
            let get = |key: &str| f64s(&file, &format!("fold.{name}.{key}"));
            let found = fold_tar_at_far(&get("distances"), &is_same, num_folds, far_target)?;
            assert_close(&found.thresholds, &get(&format!("tar_threshold{i}")), name);
            assert_eq!(found.tars, get(&format!("tar{i}")), "{name} {far_target}");
            assert_eq!(found.fars, get(&format!("far{i}")), "{name} {far_target}");
            let summary = [found.tar_mean, found.tar_std, found.far_mean];
            assert_close(&summary, &get(&format!("tar_mean_std_far{i}")), name);
        }
    }
    Ok(())
}

#[test]
fn metrics_match_naive_counting() -> Result<()> {
    let file = SafeTensors::deserialize(FIXTURE).expect("a valid fixture");
    for name in ["smooth", "ties", "exact_percent", "few_impostors", "separated", "reversed", "single"] {
        let get = |key: &str| f64s(&file, &format!("metrics.{name}.{key}"));
        let (genuine, impostor, expected) = (get("genuine"), get("impostor"), get("expected"));
        let m = Scores::new(genuine.clone(), impostor.clone())?.metrics();
        assert_close(&[m.eer, m.eer_threshold], &expected[..2], name);
        assert_close(&[m.fmr100, m.fmr1000], &expected[2..4], name);
        match m.fdr {
            Some(fdr) => assert_close(&[fdr], &expected[4..5], name),
            None => assert!(expected[4].is_nan(), "{name}: expected {}, found None", expected[4]),
        }
        assert_close(&[m.g_mean, m.i_mean, m.auc], &expected[5..], name);
        assert_eq!((m.num_genuine, m.num_impostor), (genuine.len(), impostor.len()), "{name}");
    }
    Ok(())
}

#[test]
fn metrics_do_not_depend_on_the_order_of_scores() -> Result<()> {
    let file = SafeTensors::deserialize(FIXTURE).expect("a valid fixture");
    let (genuine, impostor) = (f64s(&file, "metrics.smooth.genuine"), f64s(&file, "metrics.smooth.impostor"));
    let forward: Vec<f64> = genuine.iter().chain(&impostor).copied().collect();
    let labels: Vec<bool> = (0..forward.len()).map(|i| i < genuine.len()).collect();
    let backward: Vec<f64> = forward.iter().rev().copied().collect();
    let labels_backward: Vec<bool> = labels.iter().rev().copied().collect();
    let a = Scores::from_labelled(&forward, &labels)?;
    let b = Scores::from_labelled(&backward, &labels_backward)?;
    assert_eq!(a.metrics(), b.metrics());
    assert_eq!(a, Scores::new(genuine, impostor)?);
    Ok(())
}

#[test]
fn threshold_at_fmr_is_the_lowest_that_keeps_the_fmr() -> Result<()> {
    // Ten impostors, the highest three tied: FMR is 0.3 up to 0.9 and 0 above; 0.2 is not reached in between.
    let impostor = vec![0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 0.9, 0.9];
    let clean = Scores::new(vec![0.9, 0.95], impostor.clone())?;
    let threshold = clean.threshold_at_fmr(0.2)?;
    assert_eq!(threshold, 0.9f64.next_up());
    assert_eq!((clean.fmr_at_threshold(threshold), clean.fnmr_at_threshold(threshold)), (0.0, 0.5));
    assert_eq!(clean.threshold_at_fmr(0.3)?, 0.7f64.next_up());
    assert_eq!(clean.fmr_at_threshold(0.9), 0.3);
    // A threshold of unmasked comparisons applied to masked ones.
    let masked = Scores::new(vec![0.4, 0.8, 0.9, 0.99], impostor)?;
    assert_eq!(masked.fnmr_at_threshold(threshold), 0.75);
    assert_eq!(clean.fnmr_at_fmr(0.3)?, 0.0);

    // FMR 29/100 and the literal 0.29 are the same double, though 0.29 * 100 is below 29.
    let hundred = Scores::new(vec![0.5], (0..100).map(f64::from).collect())?;
    assert_eq!(hundred.threshold_at_fmr(0.29)?, 70f64.next_up());
    Ok(())
}

#[test]
fn rates_too_low_for_the_scores_are_not_measurable() -> Result<()> {
    let with = |n: u32| Scores::new(vec![1.0], (0..n).map(f64::from).collect());
    for (num_impostor, is_measurable) in [(99, false), (100, true), (1000, true)] {
        assert_eq!(with(num_impostor)?.threshold_at_fmr(0.01).is_ok(), is_measurable, "{num_impostor} impostors");
    }
    let text = message(with(99)?.threshold_at_fmr(1e-5));
    assert!(text.contains("FMR 0.00001 cannot be measured on 99 impostor scores"), "{text}");
    for fmr in [0.0, 1.0, -0.1, f64::NAN] {
        assert!(message(with(99)?.threshold_at_fmr(fmr)).contains("between 0 and 1"));
    }
    Ok(())
}

#[test]
fn equal_scores_have_no_fisher_ratio() -> Result<()> {
    // The mean of three times 0.1 is not 0.1 in binary.
    assert_eq!(Scores::new(vec![0.1; 3], vec![-0.7; 3])?.metrics().fdr, None);
    Ok(())
}

#[test]
fn a_million_scores_have_the_figures_of_their_distributions() -> Result<()> {
    // Genuine uniform in [0, 1), impostor in [-0.5, 0.5): EER 1/4, AUC 1 - 1/8.
    let n = 1_000_000u64;
    let uniform = |shift: f64| (0..n).map(|i| (i * 7919 % n) as f64 / n as f64 + shift).collect();
    let m = Scores::new(uniform(0.0), uniform(-0.5))?.metrics();
    assert!((m.eer - 0.25).abs() < 1e-5 && (m.auc - 0.875).abs() < 1e-5, "{m:?}");
    assert!((m.eer_threshold - 0.25).abs() < 1e-5 && (m.fdr.unwrap_or(0.0) - 1.5).abs() < 1e-4, "{m:?}");
    Ok(())
}

#[test]
fn bad_scores_are_refused() {
    assert_eq!(message(Scores::new(vec![], vec![0.1])), "expected at least one genuine score, found none");
    assert_eq!(message(Scores::from_labelled(&[0.1], &[true])), "expected at least one impostor score, found none");
    let text = message(Scores::new(vec![0.1], vec![0.2, f64::NAN]));
    assert_eq!(text, "impostor score 1: expected a finite number, found NaN");
    assert!(Scores::new(vec![f64::INFINITY], vec![0.0]).is_err());
    let text = message(Scores::from_labelled(&[0.1, 0.2], &[true]));
    assert_eq!(text, "expected a label for each of 2 scores, found 1 labels");
}

#[test]
fn bad_folds_are_refused() {
    let (distances, is_same) = ([0.1, 3.0, 0.2, 2.0], [true, false, true, false]);
    for num_folds in [0, 1, 5] {
        assert!(message(fold_accuracy(&distances, &is_same, num_folds)).contains("folds"));
    }
    assert!(message(fold_accuracy(&distances, &is_same[..3], 2)).contains("3 labels"));
    for bad in [-0.1, f64::NAN, f64::INFINITY] {
        let text = message(fold_accuracy(&[0.1, 3.0, bad, 2.0], &is_same, 2));
        assert!(text.starts_with("distance 2: expected a finite number from 0"), "{text}");
    }
    for target in [0.0, 1.0, f64::NAN] {
        assert!(message(fold_tar_at_far(&distances, &is_same, 2, target)).contains("FAR target"));
    }
    // Four folds of one pair each: none has both kinds.
    let text = message(fold_tar_at_far(&distances, &is_same, 4, 1e-3));
    assert!(text.contains("fold 0 of 4") && text.contains("1 same and 0 different"), "{text}");
}

#[test]
fn squared_l2_of_unit_vectors() {
    assert_eq!([1.0, 0.0, -1.0].map(squared_l2), [0.0, 2.0, 4.0]);
    // A cosine rounded above 1 is no negative distance.
    assert_eq!(squared_l2(1.0 + f64::EPSILON), 0.0);
}
