//! Students beyond the paper's arms: the teacher's class centres, paired views, images without labels.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use maskinv::data::{Batch, Loader, Transform};
use maskinv::train::{Arm, Checkpoint, Config, Experiment, RunFolder, Start};

use crate::cli::{TINY, faces, maskinv, refused, stdout, str};
use crate::train::tiny;

fn run(config: &Config, folder: &Path) -> Result<()> {
    let experiment = Experiment::new(config.clone())?.in_folder(RunFolder::empty(folder)?);
    Ok(experiment.run(&mut |_| ()).map(drop)?)
}

fn centres(folder: &Path, arm: Arm) -> Result<Tensor> {
    let path = folder.join(arm.name()).join("header.safetensors");
    candle_core::safetensors::load(&path, &Device::Cpu)?.remove("kernel").context("class centres")
}

fn batch(config: &Config) -> Result<Batch> {
    let transform = Transform::new(&config.augment, &config.mask)?;
    let loader = Loader::new(config.data.open_train()?, transform, &config.loader, config.model.input_size, 0)?;
    Ok(loader.epoch(0).next().context("a batch")??)
}

#[test]
fn class_centres_may_be_the_teachers() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut config = tiny();
    config.set("distill.centres=teacher-mean")?;
    config.train.arms = vec![Arm::Teacher, Arm::Hg, Arm::Ada];
    config.train.hg_start = Start::Teacher;
    run(&config, folder.path())?;
    // The means of unit embeddings stay as they are; adaptive centres have moved from them.
    let lengths = |kernel: &Tensor| -> Result<Vec<f32>> { Ok(kernel.sqr()?.sum(0)?.sqrt()?.to_vec1()?) };
    let (fixed, moved) = (centres(folder.path(), Arm::Hg)?, centres(folder.path(), Arm::Ada)?);
    assert!(lengths(&fixed)?.iter().all(|length| (length - 1.0).abs() < 1e-5), "{:?}", lengths(&fixed)?);
    assert_eq!((fixed.dims(), moved.dims()), (&[16, 8][..], &[16, 8][..]));
    let differences: Vec<f32> = (fixed - moved)?.abs()?.max(0)?.to_vec1()?;
    assert!(differences.iter().all(|difference| *difference > 1e-3), "{differences:?}");
    Ok(())
}

#[test]
fn paired_views_show_each_face_without_and_with_a_mask() -> Result<()> {
    let mut config = tiny();
    config.set("augment.paired=true")?;
    config.set("augment.mask=0")?;
    let (batch, size) = (batch(&config)?, config.loader.batch_size);
    assert_eq!((batch.num_views(), batch.student.num_images, batch.teacher.num_images), (2, 2 * size, size));
    let of_image = batch.student.values.len() / batch.student.num_images;
    // Nothing else changes the view without a mask.
    assert!(batch.student.values[..size * of_image] == batch.teacher.values);
    assert!(batch.covered[..size].iter().all(|share| *share == 0.0));
    assert!(batch.covered[size..].iter().all(|share| (0.1..0.7).contains(share)), "{:?}", batch.covered);
    let (student, covered) = (batch.student.clone(), batch.covered.clone());
    let parts = batch.parts(4)?;
    let part = &parts[1];
    let range = size / 4..size / 2;
    assert_eq!((part.num_views(), &part.covered[size / 4..]), (2, &covered[size + range.start..size + range.end]));
    let masked = &student.values[(size + range.start) * of_image..(size + range.end) * of_image];
    assert!(&part.student.values[size / 4 * of_image..] == masked);
    config.set("distill.agreement=1")?;
    config.validate()?;
    config.set("augment.paired=false")?;
    assert!(config.validate().unwrap_err().to_string().contains("distill.agreement: is of paired views"));
    Ok(())
}

#[test]
fn images_without_labels_teach_by_distillation() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let others = faces(folder.path(), 3, 4)?;
    // In no person's folder.
    std::fs::rename(others.join("p0/p0_0001.jpg"), others.join("a.jpg"))?;
    let mut config = tiny();
    config.set(&format!("data.unlabelled={}", str(&others)))?;
    let train = config.data.open_train()?;
    assert_eq!((train.len(), train.num_classes(), train.num_identities()), (64 + 12, 8, 9));
    assert_eq!((train.class(63).is_some(), train.class(64), train.identity_name(8)), (true, None, "(no label)".into()));
    assert_eq!(train.get(64)?.label, 8);
    let labels = batch(&config)?.labels;
    assert!(labels.contains(&-1) && labels.iter().any(|label| *label >= 0), "{labels:?}");
    // Of both kinds: the margin loss has the eight classes that are named.
    config.train.arms = vec![Arm::Teacher, Arm::Hg];
    config.train.hg_start = Start::Teacher;
    run(&config, &folder.path().join("both"))?;
    assert_eq!(centres(&folder.path().join("both"), Arm::Hg)?.dims(), [16, 8]);
    config.set("data.labels=none")?;
    assert_eq!(config.data.open_train()?.num_classes(), 0);
    let error = run(&config, &folder.path().join("none")).unwrap_err().to_string();
    assert!(error.contains("teacher has a margin loss, which needs labels, but no image has one"), "{error}");
    config.train.arms = vec![Arm::Distill];
    config.train.start = Start::Teacher;
    let teacher = maskinv::models::load_model(&folder.path().join("both/teacher"), None)?.model;
    let given = Checkpoint { name: "teacher".into(), backbone: teacher, header: None };
    let experiment = Experiment::new(config.clone())?.with_teacher(given);
    experiment.in_folder(RunFolder::empty(&folder.path().join("none"))?).run(&mut |_| ())?;
    assert!(folder.path().join("none/distill/backbone.safetensors").is_file());
    config.set("data.unlabelled=no/such/folder")?;
    assert!(config.data.open_train().err().context("an error")?.to_string().contains("no/such/folder"));
    Ok(())
}

#[test]
fn an_ablation_trains_its_rows_with_every_seed_and_compares_them() -> Result<()> {
    let root = tempfile::tempdir()?;
    let path = |name: &str| root.path().join(name).display().to_string();
    let (file, out, of_teacher, teacher) = (path("sweep.toml"), path("out"), path("t"), path("t/teacher"));
    let train = [&["train", "--quiet", "--arm", "teacher", "--out", &of_teacher][..], TINY].concat();
    assert!(maskinv(&train)?.status.success());
    let head = format!("seeds = [3, 4]\nbaseline = \"aug\"\nset = [\"train.teacher={teacher}\"]\n");
    let write = |rows: &str| std::fs::write(path("sweep.toml"), format!("{head}{rows}"));
    let rows = "[[rows]]\nname = \"aug\"\narm = \"aug\"\n[[rows]]\nname = \"angular\"\narm = \"distill\"\n";
    write(&format!("{rows}set = [\"distill.kind=angular\"]\n"))?;
    let sweep = [&["train", "--quiet", "--sweep", &file, "--out", &out][..], TINY].concat();
    let output = maskinv(&sweep)?;
    let (printed, said) = (stdout(&output), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(output.status.success() && said.contains("4 of 4: angular, seed 4"), "{said}");
    for text in ["EER %, 2 seeds", "FDR, 2 seeds", "p against aug (FMR1000), by seed", "U-M"] {
        assert!(printed.contains(text), "expected {text}: {printed}");
    }
    let results: serde_json::Value = serde_json::from_slice(&std::fs::read(path("out/sweep.json"))?)?;
    let row = &results["rows"][1];
    // The figures and tests are those of the trainings.
    for seed in [3, 4] {
        let folder = path(&format!("out/angular/seed-{seed}"));
        let run: serde_json::Value = serde_json::from_slice(&std::fs::read(format!("{folder}/results.json"))?)?;
        assert_eq!(run["config"]["distill"]["kind"], "angular");
        assert_eq!(row["figures"]["U-M"][seed.to_string()], run["arms"]["distill"]["settings"]["U-M"]);
        let base: serde_json::Value =
            serde_json::from_slice(&std::fs::read(path(&format!("out/aug/seed-{seed}/results.json")))?)?;
        let eer = |run: &serde_json::Value, arm: &str| run["arms"][arm]["settings"]["M-M"]["eer"].as_f64();
        let expected = eer(&run, "distill").zip(eer(&base, "aug")).map(|(a, b)| a - b).context("rates")?;
        let found = row["tests"]["M-M"]["EER"][seed.to_string()]["difference"].as_f64().context("a difference")?;
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
    }
    // What is finished stays; other settings are refused.
    let again = maskinv(&sweep)?;
    assert_eq!(stdout(&again), printed);
    assert!(String::from_utf8_lossy(&again.stderr).contains("1 of 4: aug, seed 3: is finished"));
    write(&format!("{rows}set = [\"distill.kind=cosine\"]\n"))?;
    let error = refused(&sweep)?;
    assert!(error.contains("angular/seed-3: expected the settings that it was begun with"), "{error}");
    for (rows, text) in [
        ("rows = []\n", "baseline: expected the name of a row, found aug"),
        ("[[rows]]\nname = \"../aug\"\narm = \"aug\"\n", "expected a name of letters, digits"),
        ("[[rows]]\nname = \"aug\"\narm = \"aug\"\nset = [\"no.such=1\"]\n", "row aug: "),
        ("[[rows]]\nname = \"aug\"\narm = \"arm\"\n", "sweep.toml: "),
    ] {
        write(rows)?;
        let error = refused(&sweep)?;
        assert!(error.contains(text), "expected {text}: {error}");
    }
    Ok(())
}
