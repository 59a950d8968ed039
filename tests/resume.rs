//! A training that stops, however it stops, ends as one that never did.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use maskinv::Error;
use maskinv::records::{Speed, StepRecord, read_steps};
use maskinv::train::{Arm, ArmOutcome, Config, Event, Experiment, RunFolder, preset, states_folder};

use crate::cli::{faces, maskinv, refused, str};

/// All four arms of a few steps each, with everything that has a state of its own: dropout, momentum, running
/// statistics, averages, the best evaluation so far.
const SETTINGS: [&str; 22] = [
    "train.epochs=2",
    "train.teacher_epochs=2",
    "train.hg_start=\"lg\"",
    "train.hg_first_epoch=1",
    "train.save_every=3",
    "train.accumulate=2",
    "train.ema=0.8",
    "watch.every=1",
    "watch.patience=9",
    "model.width=0.125",
    "model.embedding_size=16",
    "model.input_size=32",
    "model.dropout=0.2",
    "loader.batch_size=16",
    "optim.lr_batch=16",
    "train.teacher=none",
    "data.procedural_teacher=none",
    "data.procedural.first_identity=0",
    "data.procedural.num_identities=8",
    "data.procedural.images_per_identity=8",
    "data.procedural_test.num_identities=5",
    "eval.bootstrap.replicates=0",
];

fn config() -> Result<Config> {
    let mut config = preset("procedural")?;
    SETTINGS.iter().try_for_each(|set| config.set(set))?;
    config.train.arms = Arm::PAPER.to_vec();
    Ok(config)
}

/// Runs until the whole experiment has taken `stop_after` steps; the results, unless it stopped.
fn run(config: &Config, out: &Path, resumes: bool, stop_after: usize) -> Result<Option<BTreeMap<Arm, ArmOutcome>>> {
    let flag = Arc::new(AtomicBool::new(false));
    let experiment = Experiment::new(config.clone())?.stopped_by(flag.clone());
    let experiment = match resumes {
        true => experiment.resumed(RunFolder::of_run(out)?)?,
        false => experiment.in_folder(RunFolder::empty(out)?),
    };
    let mut num_steps = 0;
    let outcome = experiment.run(&mut |event| {
        if let Event::Step(_) = event {
            num_steps += 1;
            flag.store(num_steps >= stop_after, Ordering::Relaxed);
        }
    });
    match outcome {
        Ok(outcome) => Ok(Some(outcome.arms)),
        Err(Error::Stopped { .. }) => Ok(None),
        Err(other) => Err(other.into()),
    }
}

fn resumed(config: &Config, folder: &Path) -> Result<Experiment> {
    Ok(Experiment::new(config.clone())?.resumed(RunFolder::of_run(folder)?)?)
}

/// Results without the time they took.
fn timeless(mut arms: BTreeMap<Arm, ArmOutcome>) -> BTreeMap<Arm, ArmOutcome> {
    arms.values_mut().for_each(|arm| arm.seconds = 0.0);
    arms
}

/// Every weight that a training leaves.
fn weights(out: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for folder in ["teacher", "aug", "lg", "lg/epoch-1", "hg"] {
        for file in ["backbone.safetensors", "header.safetensors"] {
            let name = format!("{folder}/{file}");
            found.insert(name.clone(), std::fs::read(out.join(&name)).with_context(|| name)?);
        }
    }
    Ok(found)
}

#[test]
fn a_training_that_stops_anywhere_ends_as_one_that_never_did() -> Result<()> {
    let (root, mut config) = (tempfile::tempdir()?, config()?);
    for optimizer in ["sgd", "adamw"] {
        config.set(&format!("optim.kind={optimizer}"))?;
        config.set(if optimizer == "sgd" { "optim.lr=0.01" } else { "optim.lr=0.0005" })?;
        let whole = root.path().join(optimizer);
        // Four steps an epoch: 8 of the teacher, 8 of aug, 8 of lg, 4 of hg.
        let expected = run(&config, &whole, false, usize::MAX)?.context("it was not stopped")?;
        let expected_weights = weights(&whole)?;
        assert!(!states_folder(&whole.join("hg")).exists(), "states of what is finished are of no use");
        let stopped = root.path().join(format!("{optimizer}-stopped"));
        // Stops after 3, 1, 4, 5, ... further steps: at the ends of epochs and arms, within both, before anything was
        // saved on its own.
        let (mut resumes, mut found) = (false, None);
        for stop_after in [3, 1, 4, 5, 2, 1, 3, 4, 1, usize::MAX] {
            found = run(&config, &stopped, resumes, stop_after)?;
            resumes = true;
        }
        assert_eq!(timeless(found.context("it was not stopped")?), timeless(expected), "{optimizer}");
        for (name, bytes) in weights(&stopped)? {
            assert!(bytes == expected_weights[&name], "{optimizer}: {name}");
        }
        for arm in Arm::PAPER {
            let records = |out: &Path| -> Result<Vec<StepRecord>> {
                let timeless = |mut record: StepRecord| {
                    record.speed = Speed::default();
                    record
                };
                Ok(read_steps(&out.join(arm.name()))?.into_iter().map(timeless).collect())
            };
            let (found, expected) = (records(&stopped)?, records(&whole)?);
            assert!(expected.len() >= 4 && found == expected, "{optimizer}, {}: every step once", arm.name());
            let evaluations = |out: &Path| -> Result<String> {
                Ok(std::fs::read_to_string(out.join(arm.name()).join("evaluations.jsonl"))?)
            };
            assert_eq!(evaluations(&stopped)?, evaluations(&whole)?);
        }
        let json = |out: &Path| -> Result<serde_json::Value> {
            let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("results.json"))?)?;
            let arms = json["arms"].as_object_mut().context("arms")?;
            arms.values_mut().for_each(|arm| arm["seconds"] = 0.into());
            Ok(json)
        };
        assert_eq!(json(&stopped)?, json(&whole)?);
    }
    Ok(())
}

#[test]
fn a_spoiled_state_gives_way_to_the_one_before_and_other_settings_are_refused() -> Result<()> {
    let (root, config) = (tempfile::tempdir()?, config()?);
    let [whole, stopped] = ["whole", "stopped"].map(|name| root.path().join(name));
    let expected = run(&config, &whole, false, usize::MAX)?.context("it was not stopped")?;
    assert_eq!(run(&config, &stopped, false, 7)?, None);
    let states = states_folder(&stopped.join("teacher"));
    let newest = states.join("step-000000007/optimizer.safetensors");
    let mut bytes = std::fs::read(&newest)?;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&newest, bytes)?;
    let mut notices = Vec::new();
    let outcome = resumed(&config, &stopped)?.run(&mut |event| {
        if let Event::Notice(text) = event {
            notices.push(text);
        }
    })?;
    let said = notices.join("\n");
    assert!(said.contains("optimizer.safetensors: SHA-256 mismatch"), "{said}");
    assert!(said.contains("resumes after step 6"), "{said}");
    assert_eq!(timeless(outcome.arms), timeless(expected));
    let mut other = config;
    other.set("train.seed=7")?;
    let error = resumed(&other, &stopped).err().context("accepted")?.to_string();
    let expected = "results.json: expected results of the same settings, found train.seed = 0 instead of 7";
    assert!(error.ends_with(expected), "{error}");
    Ok(())
}

/// The flags of a training of many short steps in this folder.
fn flags(out: &Path, epochs: usize) -> Vec<String> {
    let mut flags = vec!["train".to_owned(), "--out".to_owned(), str(out).to_owned()];
    flags.extend(["--resume", "auto", "--arm", "aug", "--set", "augment.mask=0.5"].map(str::to_owned));
    for set in SETTINGS.iter().filter(|set| !set.starts_with("train.hg")) {
        flags.extend(["--set".to_owned(), (*set).to_owned()]);
    }
    flags.extend([
        "--set".to_owned(),
        format!("train.epochs={epochs}"),
        "--set".to_owned(),
        "train.hg_first_epoch=0".to_owned(),
    ]);
    flags
}

fn weights_of_aug(out: &Path) -> Result<Vec<u8>> {
    Ok(std::fs::read(out.join("aug/backbone.safetensors"))?)
}

/// The name of the newest state.
fn newest(out: &Path) -> Option<String> {
    let entries = std::fs::read_dir(states_folder(&out.join("aug"))).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name.starts_with("step-")).max()
}

/// Waits until a process has saved another state than `before`; it is an error if it ends before.
fn wait_for_another(child: &mut Child, out: &Path, before: Option<&String>) -> Result<()> {
    let began = Instant::now();
    while newest(out).as_ref() <= before {
        if let Some(status) = child.try_wait()? {
            anyhow::bail!("it ended before it saved another state: {status}");
        }
        anyhow::ensure!(began.elapsed() < Duration::from_secs(120), "no state within two minutes");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Sends a signal to a process that has not been waited for.
#[cfg(unix)]
fn send(child: &Child, signal: &str) -> Result<()> {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status()?;
    anyhow::ensure!(status.success(), "kill {signal}: {status}");
    Ok(())
}

#[cfg(unix)]
#[test]
#[ignore = "heavy: five trainings; .ci/run runs it"]
fn heavy_signals_stop_after_the_step_and_a_killed_training_goes_on() -> Result<()> {
    let root = tempfile::tempdir()?;
    let [whole, stopped] = ["whole", "stopped"].map(|name| root.path().join(name));
    let flags = |out: &PathBuf| flags(out, 12);
    let args = flags(&whole);
    let output = maskinv(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    use std::os::unix::process::ExitStatusExt;
    for (signal, code, by) in [("-TERM", Some(75), None), ("-KILL", None, Some(9)), ("-INT", Some(75), None)] {
        let before = newest(&stopped);
        let mut child = Command::new(env!("CARGO_BIN_EXE_maskinv"))
            .args(flags(&stopped))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        wait_for_another(&mut child, &stopped, before.as_ref())?;
        // Stopped, it does not come to its end between the check and the signal, which waits until it goes on.
        send(&child, "-STOP")?;
        let step = newest(&stopped).and_then(|name| name.strip_prefix("step-")?.parse::<usize>().ok());
        let step = step.context("a state")?;
        assert!(child.try_wait()?.is_none() && step <= 36, "{signal}: after step {step} of 48, too late");
        send(&child, signal)?;
        send(&child, "-CONT")?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.status.signal()), (code, by), "{signal}: {said}");
        if code.is_some() {
            assert!(said.contains("as requested; resume with: maskinv train --resume"), "{said}");
        }
    }
    let output = maskinv(&["train", "--resume", str(&stopped)])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(weights_of_aug(&stopped)? == weights_of_aug(&whole)?);
    // What is finished is not trained again.
    let output = maskinv(&["train", "--resume", str(&stopped)])?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("already trained"), "{said}");
    // Earlier versions wrote no scores; their trainings still end.
    std::fs::remove_dir_all(stopped.join("aug/scores"))?;
    let output = maskinv(&["train", "--resume", str(&stopped)])?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("is not compared with the other arms"), "{said}");
    Ok(())
}

/// A limit on the size of files takes the place of a full disk: writing fails amid a file, for root too.
#[cfg(target_os = "linux")]
#[test]
fn a_state_that_finds_no_room_leaves_the_one_before_and_the_training_goes_on_with_room() -> Result<()> {
    let root = tempfile::tempdir()?;
    let [whole, stopped] = ["whole", "stopped"].map(|name| root.path().join(name));
    let limited = |out: &Path, kib: &str| -> Result<std::process::Output> {
        let script = "trap '' XFSZ; ulimit -f \"$1\"; shift; exec \"$@\"";
        let mut command = Command::new("bash");
        command.args(["-c", script, "bash", kib, env!("CARGO_BIN_EXE_maskinv")]).args(flags(out, 3));
        Ok(command.output()?)
    };
    assert!(limited(&whole, "unlimited")?.status.success());
    let mut child =
        Command::new(env!("CARGO_BIN_EXE_maskinv")).args(flags(&stopped, 3)).stderr(Stdio::null()).spawn()?;
    wait_for_another(&mut child, &stopped, None)?;
    child.kill()?;
    child.wait()?;
    let before = newest(&stopped).context("a state")?;
    // Room for the records, not for a backbone.
    let output = limited(&stopped, "40")?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let says = [format!("{before}): "), "cannot save the checkpoint of step ".to_owned(), "File too large".to_owned()];
    assert!(says.iter().all(|what| said.contains(what)), "{said}");
    assert_eq!(newest(&stopped), Some(before));
    let left: Vec<_> =
        std::fs::read_dir(states_folder(&stopped.join("aug")))?.map(|e| e.map(|e| e.file_name())).collect();
    assert!(left.iter().flatten().all(|name| name.to_string_lossy().starts_with("step-")), "{left:?}");
    let output = maskinv(&["train", "--resume", str(&stopped)])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(weights_of_aug(&stopped)? == weights_of_aug(&whole)?);
    Ok(())
}

/// A training of eight people that stops after its first steps, and its data.
fn begun(root: &Path) -> Result<(PathBuf, PathBuf)> {
    let (data, out) = (faces(root, 8, 4)?, root.join("out"));
    let mut config = preset("lfw-small")?;
    for set in SETTINGS.iter().filter(|set| set.starts_with("model.") || set.starts_with("eval.")) {
        config.set(set)?;
    }
    config.train.arms = vec![Arm::Aug];
    config.loader.batch_size = 8;
    config.data.root = Some(data.clone());
    config.train.epochs = 3;
    assert_eq!(run(&config, &out, false, 3)?, None);
    Ok((data, out))
}

#[test]
fn data_that_changed_is_refused_with_the_first_difference_and_accepted_on_demand() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (data, out) = begun(root.path())?;
    let resume = ["train", "--resume", str(&out)];
    std::fs::rename(data.join("p0"), data.join("z0"))?;
    let error = refused(&resume)?;
    assert!(error.contains("training set: person 0 was p0, now p1"), "{error}");
    assert!(error.contains("--accept-changed-data"), "{error}");
    std::fs::rename(data.join("z0"), data.join("p0"))?;
    let image = data.join("p1/p1_0001.jpg");
    let whole = std::fs::read(&image)?;
    std::fs::copy(data.join("p2/p2_0003.jpg"), &image)?;
    let error = refused(&resume)?;
    assert!(error.contains("the images of p1 have changed"), "{error}");
    let output = maskinv(&[&resume[..], &["--accept-changed-data"]].concat())?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("goes on with changed data: "), "{said}");
    // The record is now of the data that it went on with.
    assert!(maskinv(&resume)?.status.success());
    std::fs::write(&image, whole)?;
    assert!(refused(&resume)?.contains("the images of p1 have changed"));
    Ok(())
}

#[test]
fn given_weights_that_changed_are_refused() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (data, out) = begun(root.path())?;
    let (teacher, started) = (root.path().join("teacher.safetensors"), root.path().join("started"));
    std::fs::copy(
        out.join("aug/states").read_dir()?.next().context("a state")??.path().join("backbone.safetensors"),
        &teacher,
    )?;
    let begin = ["train", "--data", str(&data), "--arm", "lg", "--teacher", str(&teacher), "--out", str(&started)];
    let flags = ["--epochs", "1", "--set", "model.width=0.125", "--set", "model.input_size=32", "--batch-size", "8"];
    let sizes = ["--set", "model.embedding_size=16", "--set", "eval.bootstrap.replicates=0"];
    let output = maskinv(&[&begin[..], &flags, &sizes].concat())?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut bytes = std::fs::read(&teacher)?;
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&teacher, bytes)?;
    let error = refused(&["train", "--resume", str(&started)])?;
    assert!(error.contains("the teacher has other weights than before"), "{error}");
    Ok(())
}

#[test]
fn a_folder_has_one_training_at_a_time() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (_, out) = begun(root.path())?;
    let folder = RunFolder::of_run(&out)?;
    let holder = format!("is in use: process {} is writing to it", std::process::id());
    for args in [&["train", "--resume", str(&out)][..], &["train", "--out", str(&out), "--resume", "auto"]] {
        let error = refused(args)?;
        assert!(error.contains(&holder), "{error}");
    }
    drop(folder);
    let records = std::fs::read(out.join("aug/steps.jsonl"))?;
    assert!(!records.is_empty(), "what was there stays");
    let output = maskinv(&["train", "--resume", str(&out)])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn trainings_started_at_once_get_folders_of_their_own() -> Result<()> {
    let root = tempfile::tempdir()?;
    let data = faces(root.path(), 8, 4)?;
    let begin = |lr: &str| {
        Command::new(env!("CARGO_BIN_EXE_maskinv"))
            .args(["train", "--data", str(&data), "--arm", "aug", "--epochs", "1", "--lr", lr, "--batch-size", "8"])
            .args([
                "--set",
                "model.width=0.125",
                "--set",
                "model.input_size=32",
                "--set",
                "eval.bootstrap.replicates=0",
            ])
            .current_dir(root.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
    };
    let children = ["0.1", "0.01", "0.001"].map(begin);
    for child in children {
        let output = child?.wait_with_output()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let mut rates = Vec::new();
    for name in ["folder-seed0", "folder-seed0-2", "folder-seed0-3"] {
        let folder = root.path().join("runs").join(name);
        let config = Config::read(&folder.join("config.toml"))?;
        let steps = read_steps(&folder.join("aug"))?;
        assert_eq!(steps.iter().map(|step| step.step).collect::<Vec<_>>(), (1..=steps.len()).collect::<Vec<_>>());
        rates.push(config.optim.lr);
    }
    rates.sort_by(f64::total_cmp);
    assert_eq!(rates, [0.001, 0.01, 0.1]);
    Ok(())
}

#[test]
fn overwriting_leaves_nothing_of_the_training_before() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (data, out) = begun(root.path())?;
    std::fs::write(out.join("results.json"), "old")?;
    std::fs::write(out.join("aug/notes.txt"), "old")?;
    // The corrected command after a mistake: what was there is still there.
    let again = ["train", "--data", str(&data), "--arm", "aug", "--out", str(&out), "--overwrite", "--epochs", "1"];
    let flags = ["--set", "model.width=0.125", "--set", "model.input_size=32", "--batch-size", "8"];
    refused(&[&again[..], &flags, &["--start", "nothing.safetensors"]].concat())?;
    assert!(out.join("aug/notes.txt").is_file() && std::fs::read(out.join("results.json"))? == b"old");
    let output = maskinv(&[&again[..], &flags].concat())?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!out.join("aug/notes.txt").exists() && std::fs::read(out.join("results.json"))? != b"old");
    Ok(())
}

#[test]
fn a_finished_arm_whose_weights_are_gone_is_trained_again() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (_, out) = begun(root.path())?;
    let resume = ["train", "--resume", str(&out)];
    assert!(maskinv(&resume)?.status.success());
    let weights = weights_of_aug(&out)?;
    std::fs::remove_file(out.join("aug/backbone.safetensors"))?;
    let output = maskinv(&resume)?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("trained again, "), "{said}");
    assert!(weights_of_aug(&out)? == weights);
    Ok(())
}

#[test]
fn what_cannot_be_gone_on_with_is_said() -> Result<()> {
    let root = tempfile::tempdir()?;
    let nowhere = root.path().join("nowhere");
    assert!(refused(&["train", "--resume", str(&nowhere)])?.contains("expected"));
    assert!(refused(&["train", "--resume", "auto"])?.contains("expected --out too"));
    let out = root.path().join("out");
    let args = flags(&out, 1);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = maskinv(&args)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let error = refused(&["train", "--resume", str(&out), "--lr", "0.5"])?;
    assert!(error.contains("expected the settings that it was begun with: optim.lr = 0.5 instead of 0."), "{error}");
    let error = refused(&["train", "--resume", str(&out), "--teacher", "w600k-mbf"])?;
    assert!(error.contains("train.teacher = \"w600k-mbf\" instead of none"), "{error}");
    Ok(())
}
