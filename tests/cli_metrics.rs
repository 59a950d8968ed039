//! `maskinv metrics` and the scores that `maskinv evaluate` keeps.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::Result;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

fn maskinv(args: &[&str]) -> Result<Output> {
    Ok(Command::new(env!("CARGO_BIN_EXE_maskinv")).args(args).output()?)
}

fn json(args: &[&str]) -> Result<Value> {
    let output = maskinv(args)?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn str(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

/// Another system's scores of 40 people in two groups, the second of which it fails more often.
fn scores() -> String {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut text = String::from("score,is_same,person_a,person_b,group_a,group_b\n");
    for a in 0..40 {
        for b in a..40 {
            let group = |p: i32| if p % 4 == 0 { "b" } else { "a" };
            let middle = if a != b {
                0.0
            } else if group(a) == "b" {
                0.4
            } else {
                0.7
            };
            for _ in 0..if a == b { 5 } else { 2 } {
                let score: f64 = middle + rng.random_range(-0.3..0.3);
                writeln!(text, "{score},{},p{a},p{b},{},{}", i32::from(a == b), group(a), group(b)).expect("a string");
            }
        }
    }
    text
}

#[test]
fn another_systems_scores_are_judged_with_intervals_and_by_group() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("scores.csv");
    std::fs::write(&path, scores())?;
    let found = json(&["metrics", str(&path), "--group-fmr", "0.01", "--bootstrap", "200", "--json"])?;
    let figures = &found["figures"];
    assert_eq!((&figures["num_genuine"], &figures["num_impostor"]), (&200.into(), &1560.into()));
    let eer = figures["eer"].as_f64().expect("a number");
    let interval = &figures["intervals"]["eer"];
    let [low, high] = ["low", "high"].map(|end| interval[end].as_f64().expect("a number"));
    assert!(low < eer && eer < high && high - low < 0.1, "{low} < {eer} < {high}");
    assert_eq!(figures["bootstrap"], "200 bootstrap resamples of 40 people");
    let at = |i: usize| (&figures["at_fmr"][i]["fmr_target"], figures["at_fmr"][i]["fnmr"].is_f64());
    assert_eq!(
        (at(2), at(3)),
        ((&0.001.into(), true), (&0.0001.into(), false)),
        "1560 impostors measure 0.001, not less"
    );
    let rates = found["groups"]["rates"].as_array().expect("a list");
    let fnmr: Vec<f64> = rates.iter().map(|r| r["fnmr"].as_f64().expect("a number")).collect();
    assert!(fnmr[0] < 0.01 && fnmr[1] > 0.2, "{rates:?}");

    let output = maskinv(&["metrics", str(&path), "--group-fmr", "0.01", "--bootstrap", "200"])?;
    let text = String::from_utf8(output.stdout)?;
    for part in
        ["95 % intervals of 200 bootstrap resamples of 40 people", "EER %", "1e-4 not measurable on 1560", "by group"]
    {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    // Scores that are no cosines have no folds, and nothing is said of masks.
    assert!(!text.contains("over folds") && !text.contains("U-U"), "{text}");
    Ok(())
}

#[test]
fn wrong_scores_are_errors_in_a_line() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("scores.csv");
    let error = |text: &str, flags: &[&str]| -> Result<String> {
        std::fs::write(&path, text)?;
        let output = maskinv(&[&["metrics", str(&path)], flags].concat())?;
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr)?;
        assert_eq!(said.lines().count(), 1, "{said}");
        Ok(said)
    };
    assert!(error("score,is_same\n0.5,1\n", &[])?.contains("expected at least one impostor score, found none"));
    assert!(error("score,is_same\n0.5,0\n", &[])?.contains("expected at least one genuine score, found none"));
    assert!(error("score,is_same\nnan,0\n", &[])?.contains("scores.csv:2: expected a finite score, found \"nan\""));
    let grouped = "score,is_same,group_a,group_b\n0.5,1,x,x\n0.1,0,x,x\n";
    std::fs::write(&path, grouped)?;
    let output = maskinv(&["metrics", str(&path)])?;
    let said = String::from_utf8(output.stderr)?;
    assert!(output.status.success() && said.contains("FMR 0.001 cannot be measured on 1 impostor scores"), "{said}");
    assert!(error("score,is_same\n0.5,1\n0.1,0\n", &["--bootstrap", "3"])?.contains("bootstrap.replicates"));
    Ok(())
}

#[test]
fn systems_are_compared_pair_by_pair() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let [first, better, other] = ["first.csv", "better.csv", "other.csv"].map(|name| folder.path().join(name));
    let text = scores();
    std::fs::write(&first, &text)?;
    // Genuine scores higher by 0.1, the same noise.
    let improved = text.lines().map(|line| match line.split_once(",1,") {
        Some((score, rest)) => format!("{},1,{rest}\n", score.parse::<f64>().expect("a score") + 0.1),
        None => format!("{line}\n"),
    });
    std::fs::write(&better, improved.collect::<String>())?;
    let found = json(&["compare", str(&first), str(&better), "--bootstrap", "200", "--json"])?;
    let eer = &found["comparisons"][0]["figures"][0];
    assert_eq!(eer["figure"], "EER");
    let number = |value: &Value| value.as_f64().expect("a number");
    let difference = &eer["differences"][0];
    assert!(number(&difference["interval"]["high"]) < 0.0 && number(&difference["p_value"]) < 0.05, "{difference}");
    assert!((number(&eer["values"][1]) - number(&eer["values"][0]) - number(&difference["difference"])).abs() < 1e-12);

    let output = maskinv(&["compare", str(&first), str(&better), str(&first), "--bootstrap", "200"])?;
    let text = String::from_utf8(output.stdout)?;
    assert!(text.contains("EER %") && text.contains("+0.00 [+0.00, +0.00]") && text.contains('*'), "{text}");

    std::fs::write(&other, "score,is_same\n0.5,1\n0.1,0\n")?;
    let output = maskinv(&["compare", str(&first), str(&other)])?;
    let said = String::from_utf8(output.stderr)?;
    assert!(output.status.code() == Some(1) && said.contains("system 2: expected 1760 pairs"), "{said}");
    Ok(())
}
