//! Training on several ranks, started by MPI's launcher.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use maskinv::records::{StepRecord, read_steps};

/// Ten people at 32 pixels, batches of 24.
const SETTINGS: [&str; 25] = [
    "train.arms=[\"teacher\",\"hg\"]",
    "train.teacher_epochs=1",
    "train.teacher=none",
    "data.procedural_teacher=none",
    "train.epochs=4",
    "train.hg_start=\"scratch\"",
    "train.hg_first_epoch=0",
    "train.mask_head=0",
    "train.batch_norm=\"sync\"",
    "train.ema=0.8",
    "model.width=0.125",
    "model.embedding_size=16",
    "model.input_size=32",
    "model.dropout=0.2",
    "loader.batch_size=24",
    "optim.lr_batch=24",
    "optim.lr=0.003",
    "data.procedural.first_identity=0",
    "data.procedural.num_identities=10",
    "data.procedural.images_per_identity=30",
    "data.procedural_test.num_identities=5",
    "data.procedural_test.images_per_identity=4",
    "eval.bootstrap.replicates=0",
    "ranks.bucket_kib=64",
    "ranks.timeout_s=60",
];
/// What another seed changes in the error rates of so short a training.
const SEED_CHANGES: f64 = 0.05;
/// Steps of that training.
const NUM_STEPS: usize = 4 * 12;

/// Arguments of a training in `out`, with further settings.
fn training(out: &Path, settings: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = ["train", "--quiet", "--resume", "auto", "--out"].map(str::to_owned).to_vec();
    args.push(out.display().to_string());
    for set in SETTINGS.iter().chain(settings) {
        args.extend(["--set".to_owned(), (*set).to_owned()]);
    }
    args
}

/// The launcher of programs with their arguments, each on a number of ranks: `MASKINV_MPIRUN`, or else `mpirun`. It must
/// be of the MPI that the program was built with.
fn launcher(programs: &[(usize, Vec<String>)]) -> Command {
    let mpirun = std::env::var("MASKINV_MPIRUN").unwrap_or_else(|_| "mpirun".to_owned());
    let mut command = Command::new(&mpirun);
    let version = Command::new(&mpirun).arg("--version").output();
    if version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("Open MPI")) {
        command.args(["--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]);
    }
    for (i, (size, args)) in programs.iter().enumerate() {
        if i > 0 {
            command.arg(":");
        }
        command.args(["-n", &size.to_string(), env!("CARGO_BIN_EXE_maskinv")]).args(args);
    }
    command
}

fn launch(programs: &[(usize, Vec<String>)]) -> Result<Output> {
    launcher(programs).output().context("no mpirun: Open MPI or MPICH is needed")
}

/// Trains on some ranks to the end.
fn train(out: &Path, size: usize, settings: &[&str]) -> Result<Vec<StepRecord>> {
    let output = launch(&[(size, training(out, settings))])?;
    ensure!(output.status.success(), "{size} ranks: {}", String::from_utf8_lossy(&output.stderr));
    Ok(read_steps(&out.join("hg"))?)
}

/// The error rates of the finished training, by setting.
fn error_rates(out: &Path) -> Result<BTreeMap<String, f64>> {
    let results: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("results.json"))?)?;
    let settings = results["arms"]["hg"]["settings"].as_object().context("settings")?;
    let rate = |(name, value): (&String, &serde_json::Value)| {
        Ok((name.clone(), value["eer"].as_f64().context("an error rate")?))
    };
    settings.iter().map(rate).collect()
}

fn off(found: f64, expected: f64) -> f64 {
    (found - expected).abs() / expected.abs()
}

fn is_alike(found: &[StepRecord], expected: &[StepRecord], case: &str) {
    assert_eq!((found.len(), expected.len()), (NUM_STEPS, NUM_STEPS), "{case}");
    assert!(found.iter().enumerate().all(|(i, record)| record.step == i + 1), "{case}: each step once");
    for (found, expected) in found.iter().zip(expected).take(5) {
        let (found, expected) = (found.report.loss, expected.report.loss);
        assert!(off(found, expected) < 1e-4, "{case}: {found}, expected {expected}");
    }
    let means = |steps: &[StepRecord]| -> Vec<f64> {
        steps.chunks_exact(10).map(|ten| ten.iter().map(|step| step.report.loss).sum::<f64>() / 10.0).collect()
    };
    for (found, expected) in means(found).into_iter().zip(means(expected)) {
        assert!(off(found, expected) < 0.03, "{case}: {found}, expected {expected}");
    }
}

/// Settings of a student that starts from a teacher and keeps its running statistics.
fn frozen(teacher: &Path) -> Vec<String> {
    let teacher = format!("train.teacher={:?}", teacher.display().to_string());
    ["train.arms=[\"hg\"]", "train.batch_norm=\"frozen\"", "train.hg_start=\"teacher\"", &teacher]
        .map(str::to_owned)
        .to_vec()
}

#[test]
fn any_number_trains_as_one() -> Result<()> {
    let root = tempfile::tempdir()?;
    let frozen = frozen(&root.path().join("synchronised-1/teacher"));
    for (name, settings) in [("synchronised", &[][..]), ("frozen", &frozen)] {
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let out = |size: usize| root.path().join(format!("{name}-{size}"));
        let expected = train(&out(1), 1, &settings)?;
        let rates = error_rates(&out(1))?;
        for size in [2, 3, 4] {
            let case = format!("{name}, {size} ranks");
            is_alike(&train(&out(size), size, &settings)?, &expected, &case);
            for (setting, found) in error_rates(&out(size))? {
                let expected = rates[&setting];
                assert!((found - expected).abs() < SEED_CHANGES, "{case}: {setting} {found}, expected {expected}");
            }
        }
    }
    Ok(())
}

#[test]
fn evaluation_on_any_number_gives_the_same_bits() -> Result<()> {
    let root = tempfile::tempdir()?;
    train(&root.path().join("first"), 2, &[])?;
    // At a rate that changes no bit of a weight, the evaluated weights are the same on any number of ranks.
    let mut settings = frozen(&root.path().join("first/teacher"));
    settings.extend(["optim.lr=1e-30", "train.epochs=1"].map(str::to_owned));
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let mut files = Vec::new();
    for size in [1, 3] {
        let out = root.path().join(size.to_string());
        train(&out, size, &settings)?;
        files.push((std::fs::read(out.join("hg/scores/U-M.csv"))?, error_rates(&out)?));
    }
    assert!(files[0] == files[1], "one rank and three scored the same pairs differently");
    let mut said = Vec::new();
    for size in [1, 3] {
        let (out, scores) = (root.path().join("1"), root.path().join(format!("scores-{size}")));
        let mut args: Vec<String> =
            ["evaluate", "--json", "--set", "eval.bootstrap.replicates=100"].map(str::to_owned).into();
        for (flag, path) in [("--config", out.join("config.toml")), ("--scores", scores.clone())] {
            args.extend([flag.to_owned(), path.display().to_string()]);
        }
        args.push(out.join("hg").display().to_string());
        let output = launch(&[(size, args)])?;
        ensure!(output.status.success(), "{size} ranks: {}", String::from_utf8_lossy(&output.stderr));
        // One object: the other ranks say nothing.
        let mut figures: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let figures_of = figures.as_object_mut().context("an object")?;
        let device = figures_of.remove("device").context("a device")?;
        assert_eq!(device.to_string().contains("3 ranks"), size == 3, "{device}");
        // Ranks share the cores.
        figures_of.remove("threads").context("threads")?;
        let files = std::fs::read_dir(&scores)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        let mut files = files.into_iter().map(|path| Ok(std::fs::read(path)?)).collect::<Result<Vec<_>>>()?;
        files.sort();
        ensure!(files.len() > 1);
        said.push((figures, files));
    }
    assert!(said[0] == said[1], "one rank and three evaluated differently");
    Ok(())
}

#[test]
fn a_rehearsal_is_of_all_ranks() -> Result<()> {
    let out = tempfile::tempdir()?;
    let mut args = training(&out.path().join("none"), &[]);
    args.retain(|arg| !["--resume", "auto"].contains(&arg.as_str()));
    args.push("--dry-run".to_owned());
    let output = launch(&[(2, args)])?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!((said.matches("ms/step").count(), said.matches("estimated memory").count()), (1, 1), "{said}");
    assert!(!out.path().join("none").exists());
    Ok(())
}

/// The error of ranks that cannot train.
fn refused(programs: &[(usize, Vec<String>)]) -> Result<String> {
    let began = Instant::now();
    let output = launch(programs)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "it trained: {said}");
    ensure!(began.elapsed() < Duration::from_secs(30), "it took {:?}: {said}", began.elapsed());
    ensure!(said.contains("error: rank "), "{said}");
    Ok(said)
}

#[test]
fn what_differs_between_ranks_is_said() -> Result<()> {
    let root = tempfile::tempdir()?;
    let out = root.path().join("a");
    let with = |settings: &[&str]| training(&out, settings);
    let refused = |programs: &[(usize, Vec<String>)]| {
        let said = refused(programs)?;
        ensure!(!out.exists(), "a training that did not begin leaves something: {said}");
        Ok(said)
    };
    let said = refused(&[(1, with(&[])), (2, with(&["train.seed=1"]))])?;
    assert!(
        said.contains("all ranks need the same settings: rank 0 has \"seed = 0\", rank 1 has \"seed = 1\""),
        "{said}"
    );
    let said = refused(&[(5, with(&[]))])?;
    assert!(said.contains("loader.batch_size: expected a multiple of 5 for 5 ranks, found 24"), "{said}");
    let said = refused(&[(6, with(&["data.procedural.num_identities=4", "data.procedural.images_per_identity=60"]))])?;
    assert!(said.contains("6 ranks: expected at least as many classes, found 4"), "{said}");
    // Data that was changed for one of them.
    let faces = crate::cli::faces(root.path(), 12, 4)?;
    let other = crate::cli::faces(&root.path().join("other"), 12, 5)?;
    let link = root.path().join("link");
    std::os::unix::fs::symlink(&other, &link)?;
    let of = |data: &Path| [with(&["loader.batch_size=8"]), vec!["--data".into(), data.display().to_string()]].concat();
    let said = refused(&[(1, of(&faces)), (1, of(&link))])?;
    assert!(said.contains("all ranks need the same settings"), "the path is another: {said}");

    let info = launch(&[(2, vec!["info".into(), "a".into()])])?;
    let said = String::from_utf8_lossy(&info.stderr).into_owned();
    assert!(said.contains("only train and evaluate run on several ranks"), "{said}");
    Ok(())
}

/// The ranks that a launcher has started, itself or by processes between.
fn ranks_of(launcher: &Child) -> Vec<u32> {
    let stat = |pid: u32| -> Option<(String, u32)> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in brackets, and may have some; after it come the state and the parent.
        let (before, after) = stat.rsplit_once(')')?;
        Some((before.split_once('(')?.1.to_owned(), after.split_whitespace().nth(1)?.parse().ok()?))
    };
    let is_below = |pid: u32| {
        let parents = std::iter::successors(Some(pid), |pid| stat(*pid).map(|(_, parent)| parent));
        parents.take(10).any(|pid| pid == launcher.id())
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    processes.filter(|pid| stat(*pid).is_some_and(|(name, _)| name == "maskinv") && is_below(*pid)).collect()
}

fn signal(pid: u32, signal: &str) -> Result<()> {
    ensure!(Command::new("kill").args([signal, &pid.to_string()]).status()?.success(), "kill {signal} {pid}");
    Ok(())
}

/// Waits for the launcher to end; returns whether it succeeded.
fn ended(launcher: &mut Child, within: Duration) -> Result<bool> {
    let began = Instant::now();
    while began.elapsed() < within {
        if let Some(status) = launcher.try_wait()? {
            return Ok(status.success());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    launcher.kill()?;
    bail!("it goes on after {within:?}")
}

fn start(out: &Path, size: usize, settings: &[&str]) -> Result<Child> {
    let mut command = launcher(&[(size, training(out, settings))]);
    Ok(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
}

#[test]
fn a_rank_that_stalls_ends_all() -> Result<()> {
    let root = tempfile::tempdir()?;
    let out = root.path().join("a");
    // So many epochs that it does not end before.
    let settings = ["ranks.timeout_s=3", "train.epochs=1000"];
    let mut command = launcher(&[(2, training(&out, &settings))]);
    let mut launcher = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    while read_steps(&out.join("hg")).map_or(0, |steps| steps.len()) == 0 {
        ensure!(launcher.try_wait()?.is_none(), "it has ended");
        std::thread::sleep(Duration::from_millis(50));
    }
    let ranks = ranks_of(&launcher);
    assert_eq!(ranks.len(), 2);
    signal(ranks[1], "-STOP")?;
    assert!(!ended(&mut launcher, Duration::from_secs(30))?);
    let mut said = String::new();
    std::io::Read::read_to_string(&mut launcher.stderr.take().context("stderr")?, &mut said)?;
    assert!(said.contains("waited 3 s (ranks.timeout_s) for the others"), "{said}");
    Ok(())
}

#[test]
#[ignore = "takes minutes"]
fn heavy_twenty_kills_of_ranks_change_nothing() -> Result<()> {
    let root = tempfile::tempdir()?;
    let settings = ["train.save_every=5", "train.epochs=4"];
    let expected = train(&root.path().join("whole"), 2, &settings)?;
    let (mut num_kills, mut num_finished, mut num_starts) = (0, 0, 0u64);
    let mut size = 4;
    while num_kills < 20 {
        let out = root.path().join(num_finished.to_string());
        let mut launcher = start(&out, size, &settings)?;
        // Pseudo-random moments, from before the first step to after the last.
        num_starts += 1;
        let draw = num_starts.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33;
        std::thread::sleep(Duration::from_millis(100 + draw % 4000));
        let ranks = ranks_of(&launcher);
        if let Some(pid) =
            ranks.get(draw as usize % ranks.len().max(1)).filter(|_| launcher.try_wait().is_ok_and(|s| s.is_none()))
        {
            // It may have ended since.
            if signal(*pid, "-KILL").is_ok() {
                num_kills += 1;
            }
        }
        let is_finished = ended(&mut launcher, Duration::from_secs(30))?;
        assert!(ranks_of(&launcher).is_empty());
        if is_finished {
            is_alike(
                &read_steps(&out.join("hg"))?,
                &expected,
                &format!("training {num_finished}, {size} ranks at last"),
            );
            num_finished += 1;
        }
        size = 1 + (size + draw as usize) % 4;
    }
    println!("{num_kills} kills, {num_finished} trainings finished");
    ensure!(num_finished > 0, "no training came to its end");
    Ok(())
}
