//! Before, while and after a training, from the command line: dry runs, rates, records, reports, lists of trainings.

use std::path::Path;

use anyhow::{Context, Result};

use crate::cli::{TINY, maskinv, refused, stdout, str};

fn said(args: &[&str]) -> Result<(String, String)> {
    let output = maskinv(args)?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    anyhow::ensure!(output.status.success(), "{args:?}: {stderr}");
    Ok((stdout(&output), stderr))
}

/// Every file in a folder, below it too.
fn files(folder: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path.display().to_string()),
        }
    }
    Ok(found)
}

#[test]
fn a_dry_run_says_what_a_training_takes_and_leaves_nothing() -> Result<()> {
    let root = tempfile::tempdir()?;
    let out = root.path().join("out");
    let args = [&["train", "--dry-run", "--arm", "all", "--out", str(&out)][..], TINY].concat();
    let (text, _) = said(&args)?;
    for what in
        ["train: ", "test: ", "teacher ", "aug ", "lg ", "hg ", "class centres", "activations", "without evaluations"]
    {
        assert!(text.contains(what), "{what}: {text}");
    }
    assert!(!out.exists());
    let (json, stderr) = said(&[&args[..], &["--json", "--quiet"]].concat())?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    let arms = json["arms"].as_array().context("arms")?;
    assert_eq!(arms.len(), 4);
    for arm in arms {
        assert!(arm["step_s"].as_f64().is_some_and(|s| s > 0.0) && arm["num_measured"] == 10, "{arm}");
        assert!(arm["memory"]["gradients"].as_u64().is_some_and(|bytes| bytes > 1000), "{arm}");
        assert_eq!(arm["without_gradient"].as_array().map(Vec::len), Some(0), "{arm}");
    }
    // The students' teacher is kept in memory as well.
    assert!(arms[0]["memory"]["teacher"] == 0 && arms[3]["memory"]["teacher"].as_u64() > Some(1000));
    assert!(stderr.is_empty(), "{stderr}");
    let error = refused(&["train", "--dry-run", "--data", str(&root.path().join("nowhere"))])?;
    assert!(error.contains("nowhere"), "{error}");
    Ok(())
}

#[test]
fn rates_are_tried_and_advised() -> Result<()> {
    let args = [&["train", "--find-lr", "--arm", "aug", "--lr-steps", "30"][..], TINY].concat();
    let (text, _) = said(&args)?;
    assert!(text.contains("the loss falls fastest at") && text.contains("####"), "{text}");
    let (json, _) = said(&[&args[..], &["--json"]].concat())?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    let points = json["points"].as_array().context("points")?;
    assert!(points.len() > 5 && points[0]["lr"] == 1e-5, "{json}");
    assert!(points.windows(2).all(|w| w[0]["lr"].as_f64() < w[1]["lr"].as_f64()));
    let lg = [&["train", "--find-lr", "--arm", "lg"][..], TINY].concat();
    assert!(refused(&lg)?.contains("lg learns from a teacher"));
    assert!(refused(&[&args[..], &["--lr-to", "1e-9"]].concat())?.contains("expected rising rates"));
    Ok(())
}

#[test]
fn trainings_are_recorded_listed_compared_and_shown() -> Result<()> {
    let root = tempfile::tempdir()?;
    let runs = root.path().join("runs");
    let [a, b] = ["a", "b"].map(|name| runs.join(name));
    let train = |out: &Path, more: &[&str]| {
        said(&[&["train", "--arm", "aug", "--out", str(out), "--set", "watch.every=1"][..], TINY, more].concat())
    };
    let (_, loud) = train(&a, &[])?;
    assert!(loud.contains("augmentation only: ") && loud.contains("after epoch 1"), "{loud}");
    let (_, quiet) = train(&b, &["--quiet", "--seed", "5"])?;
    assert!(quiet.is_empty(), "{quiet}");

    let page = std::fs::read_to_string(a.join("report.html"))?;
    for what in ["<svg", "data:image/png;base64,", "augmentation only", "EER", "optim.lr"] {
        assert!(page.contains(what), "{what}");
    }
    assert!(!page.contains("<script") && !page.contains("http-equiv"));
    let events = files(&a.join("aug/tensorboard"))?;
    assert!(events.len() == 1 && events[0].contains("events.out.tfevents."), "{events:?}");

    let (list, _) = said(&["runs", str(&runs)])?;
    assert!(list.contains("seed 0") && list.contains("seed 5") && list.contains("steps in"), "{list}");
    let (compared, _) = said(&["runs", str(&a), str(&b)])?;
    for what in ["train.seed", "aug, U-M", "EER %", "FMR100 %"] {
        assert!(compared.contains(what), "{what}: {compared}");
    }
    assert!(!compared.contains("train.epochs"), "only what differs: {compared}");
    let (summary, _) = said(&["runs", "--seeds", str(&a), str(&b)])?;
    assert!(summary.contains("EER %, 2 seeds") && summary.contains("augmentation only"), "{summary}");
    assert!(refused(&["runs", "--seeds", str(&a)])?.contains("expected two or more trainings"));
    assert!(refused(&["runs", "--seeds", str(&a), str(&a)])?.contains("expected trainings of different seeds"));
    let named = format!("found the arms {}", a.join("aug").display());
    assert!(refused(&["info", str(&a)])?.contains(&named), "a training has no single model");
    let (json, _) = said(&["runs", str(&a), "--json"])?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    assert!(json[0]["arms"][0][1]["finished"]["num_steps"].as_u64() > Some(0), "{json}");

    // From the records alone, as often as one likes.
    std::fs::remove_file(a.join("report.html"))?;
    said(&["runs", str(&a), "--report"])?;
    assert!(a.join("report.html").exists());
    // One that is broken is said, and the others are listed.
    std::fs::write(a.join("config.toml"), "[train]\nepochs = \"many\"\n")?;
    let (list, stderr) = said(&["runs", str(&runs)])?;
    assert!(list.contains("seed 5") && !list.contains("seed 0") && stderr.contains("config.toml"), "{list} {stderr}");
    assert!(refused(&["runs", str(&a)])?.contains("config.toml"));
    assert!(refused(&["runs", str(&a.join("aug"))])?.contains("expected training folders"));
    Ok(())
}
