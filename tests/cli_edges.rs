//! What people do by habit or by mistake: links in circles, outputs that cannot be written, rates that cannot be
//! measured, thresholds of another preprocessing. No silent wrong result, no half left behind.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use maskinv::models::{Arch, Model, ModelConfig, load_model, save_model};
use maskinv::weights::{read_safetensors, write_safetensors};

use crate::cli::{faces, maskinv, refused, stdout, str};

/// A small network in a file.
fn model(root: &Path) -> Result<PathBuf> {
    let config =
        ModelConfig { arch: Arch::R18, width: 0.125, embedding_size: 16, input_size: 32, ..ModelConfig::default() };
    let path = root.join("model.safetensors");
    save_model(&path, &Model::new(&config, &Device::Cpu, 1)?, DType::F32)?;
    Ok(path)
}

fn run(args: &[&str]) -> Result<(String, String)> {
    let output = maskinv(args)?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    anyhow::ensure!(output.status.success(), "{args:?}: {stderr}");
    Ok((stdout(&output), stderr))
}

/// Names of everything in a folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

#[cfg(unix)]
#[test]
fn links_in_a_circle_end() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (model(root.path())?, faces(root.path(), 2, 2)?);
    std::fs::create_dir(faces.join(".ipynb_checkpoints"))?;
    std::fs::copy(faces.join("p0/p0_0001.jpg"), faces.join(".ipynb_checkpoints/p0_0001-checkpoint.jpg"))?;
    for (target, link) in [(".", "l1"), (".", "l2"), ("..", "p1/up"), ("p0", "again")] {
        std::os::unix::fs::symlink(target, faces.join(link))?;
    }
    let (text, _) = run(&["embed", str(&model), str(&faces)])?;
    assert_eq!(text.lines().count(), 1 + 4, "each image once: {text}");
    let masked = root.path().join("masked");
    let (_, said) = run(&["mask", str(&faces), str(&masked)])?;
    assert!(said.contains("4 images masked") && masked.join("p1/p1_0002.jpg").exists(), "{said}");
    assert_eq!(names(&masked)?, ["p0", "p1"]);
    Ok(())
}

#[test]
fn outputs_are_checked_before_any_image_is_read() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (model(root.path())?, faces(root.path(), 4, 3)?);
    let (m, d) = (str(&model), str(&faces));
    let path = |name: &str| root.path().join(name).display().to_string();
    // Were images read, the error would be about this one.
    std::fs::write(faces.join("p1/p1_0001.jpg"), "no picture")?;
    for (args, words) in [
        (&["embed", m, d, "--out", &path("missing/x.npy")][..], "missing: expected a folder to write to, found none"),
        (&["embed", m, d, "--out", &path("x.parquet")], "expected .npy or .csv"),
        (&["calibrate", m, &path("missing/c.safetensors"), "--data", d], "expected a folder to write to, found none"),
        (
            &["calibrate", m, &path("c.safetensors"), "--data", d, "--fmr", "0.0001", "--set", "data.test_share=0.5"],
            "impostor pairs to measure it",
        ),
        (&["mask", d, &path("sheet.gif"), "--sheet"], "expected an image to write (.jpg, .png"),
        (&["mask", &format!("{d}/p1/p1_0001.jpg"), &path("y.gif")], "expected an image to write (.jpg, .png"),
        (&["data", "contact-sheet", d, &path("sheet.gif")], "expected an image to write (.jpg, .png"),
        (&["data", "pairs", d, &path("missing/p.txt")], "expected a folder to write to, found none"),
        (&["convert", m, &path("missing/m.onnx")], "expected a folder to write to, found none"),
        (&["train", "--data", d, "--arm", "aug", "--out", &path("model.safetensors/x")], "model.safetensors"),
    ] {
        let error = refused(args)?;
        assert!(error.contains(words), "{args:?}: {error}");
    }
    for fmr in ["0", "1", "nan", "-0.1"] {
        let args = ["calibrate", m, &path("c.safetensors"), "--data", d, &format!("--fmr={fmr}")];
        assert_eq!(maskinv(&args)?.status.code(), Some(2), "{fmr}");
    }
    assert_eq!(names(root.path())?, ["faces", "model.safetensors"], "nothing is left");
    Ok(())
}

#[test]
fn a_failed_start_leaves_nothing_in_the_way_of_the_right_command() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (faces, out) = (faces(root.path(), 8, 4)?, root.path().join("runs/a"));
    let train = |more: &[&str]| {
        let flags =
            ["--set", "model.width=0.125", "--set", "model.input_size=32", "--batch-size", "8", "--epochs", "1"];
        let base = ["train", "--data", str(&faces), "--arm", "lg", "--out", str(&out), "--resume", "auto"];
        [&base[..], &flags, more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let error = refused(&train(&["--teacher", "mistyped.pt"]).iter().map(String::as_str).collect::<Vec<_>>())?;
    assert!(error.contains("mistyped.pt") && !root.path().join("runs").exists(), "{error}");
    let teacher = model(root.path())?;
    let right = train(&["--teacher", str(&teacher)]);
    run(&right.iter().map(String::as_str).collect::<Vec<_>>())?;
    assert!(out.join("lg/backbone.safetensors").exists());
    std::fs::remove_dir_all(root.path().join("runs"))?;
    // What is noticed only in the first step, or just before it.
    let mut file = read_safetensors(&teacher)?;
    for tensor in file.tensors.values_mut().filter(|tensor| tensor.dtype().is_float()) {
        *tensor = tensor.zeros_like()?;
    }
    let zero = root.path().join("zero.safetensors");
    write_safetensors(&zero, &file.tensors, &file.metadata)?;
    for wrong in [&["--teacher", str(&zero)][..], &["--teacher", str(&teacher), "--batch-size", "25"]] {
        let args = train(wrong);
        let output = maskinv(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
        assert!(!output.status.success() && !root.path().join("runs").exists(), "{wrong:?}");
    }
    Ok(())
}

/// A limit on the size of files takes the place of a full disk.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_no_halves() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (model(root.path())?, faces(root.path(), 4, 12)?);
    let out = root.path().join("out");
    std::fs::create_dir(&out)?;
    let at = |name: &str| out.join(name).display().to_string();
    for args in [
        &["embed", str(&model), str(&faces), "--out", &at("x.npy")][..],
        &["data", "contact-sheet", str(&faces), &at("sheet.bmp")],
        &["data", "convert", str(&faces), &at("a/b/shards"), "--to", "webdataset"],
        &["data", "convert", str(&faces), &at("a/b/faces"), "--to", "folder"],
        &["data", "convert", str(&faces), &at("a/train.rec")],
        &["mask", &format!("{}/p0/p0_0001.jpg", str(&faces)), &at("c/masked.bmp")],
        &["mask", str(&faces), &at("masked")],
    ] {
        let script = "trap '' XFSZ; ulimit -f 1; exec \"$@\"";
        let output =
            Command::new("bash").args(["-c", script, "bash", env!("CARGO_BIN_EXE_maskinv")]).args(args).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert_eq!(names(&out)?, [""; 0], "{args:?}: {said}");
    }
    Ok(())
}

#[cfg(unix)]
#[test]
fn an_interrupted_conversion_goes_on_where_it_stopped() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 40, 50)?;
    for (to, name) in [("webdataset", "shards"), ("folder", "copy")] {
        let out = root.path().join("new").join(name);
        let args = ["data", "convert", str(&faces), str(&out), "--to", to, "--shard-size", "50"];
        let mut child = Command::new(env!("CARGO_BIN_EXE_maskinv"))
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let unfinished = out.with_file_name(format!(".maskinv-unfinished-{name}"));
        // Some entries, but not all of forty.
        while !names(&unfinished).is_ok_and(|names| names.len() > 3) {
            anyhow::ensure!(child.try_wait()?.is_none(), "{to}: it ended before it could be interrupted");
            std::thread::yield_now();
        }
        Command::new("kill").args(["-INT", &child.id().to_string()]).status()?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("the same command goes on where it stopped"), "{to}: {said}");
        assert!(!out.exists() && unfinished.exists(), "{to}");
        let before = names(&unfinished)?;
        let first = unfinished.join(before.iter().find(|name| !name.starts_with('.')).context("an entry")?);
        let made = std::fs::metadata(&first)?.created().ok();
        run(&args)?;
        assert!(out.exists() && !unfinished.exists(), "{to}");
        let kept = std::fs::metadata(out.join(first.file_name().context("a name")?))?.created().ok();
        assert_eq!(made, kept, "{to}: what was complete was not written again");
        let whole = root.path().join(format!("{name}-at-once"));
        run(&["data", "convert", str(&faces), str(&whole), "--to", to, "--shard-size", "50"])?;
        let same = Command::new("diff").args(["-r", str(&out), str(&whole)]).output()?;
        assert!(same.status.success(), "{to}: {}", String::from_utf8_lossy(&same.stdout));
    }
    Ok(())
}

#[test]
fn thresholds_do_not_outlive_what_they_were_measured_with() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (model(root.path())?, faces(root.path(), 8, 4)?);
    // As after a training: counters that ONNX files do not have.
    let mut file = read_safetensors(&model)?;
    for (name, tensor) in &mut file.tensors {
        if name.ends_with("num_batches_tracked") {
            *tensor = tensor.ones_like()?;
        }
    }
    write_safetensors(&model, &file.tensors, &file.metadata)?;
    let ready = root.path().join("ready.safetensors");
    let data = ["--data", str(&faces), "--set", "data.test_share=0.5", "--fmr", "0.2", "--setting", "U-M"];
    run(&[&["calibrate", str(&model), str(&ready)][..], &data].concat())?;
    let thresholds = |path: &Path| {
        let model = load_model(path, None)?.model;
        assert_eq!(model.mask_head().is_some(), !model.thresholds().is_empty(), "the head stays and goes with them");
        Ok::<_, anyhow::Error>(model.thresholds().len())
    };
    assert_eq!(thresholds(&ready)?, 1);
    let dropped = "thresholds are dropped, they were measured with";
    for (name, flag, words) in [
        ("bgr.safetensors", &["--bgr"][..], dropped),
        ("mean.onnx", &["--mean", "100"], dropped),
        ("half.safetensors", &["--dtype", "f16"], "thresholds are dropped, they were measured in f32"),
    ] {
        let path = root.path().join(name);
        let (_, said) = run(&[&["convert", str(&ready), str(&path)][..], flag].concat())?;
        assert!(said.contains(words), "{name}: {said}");
        assert_eq!(thresholds(&path)?, 0, "{name}");
    }
    let same = root.path().join("same.onnx");
    run(&["convert", str(&ready), str(&same)])?;
    assert_eq!(thresholds(&same)?, 1, "nothing has changed");
    let face = faces.join("p0/p0_0001.jpg");
    let (text, said) = run(&["verify", str(&ready), str(&face), str(&face), "--bgr"])?;
    assert!(text.contains("no threshold") && said.contains(dropped), "{text}{said}");
    assert!(said.contains("the mask head is dropped, it was fitted to other weights or preprocessing"), "{said}");
    // Other weights under the old metadata.
    let mut file = read_safetensors(&ready)?;
    let weight = file.tensors.get_mut("fc.weight").context("a weight")?;
    *weight = (&*weight * 1.5)?;
    write_safetensors(&ready, &file.tensors, &file.metadata)?;
    let (text, _) = run(&["info", str(&ready)])?;
    assert!(text.contains("they were measured with other weights"), "{text}");
    Ok(())
}

#[test]
fn embeddings_without_a_length_are_errors_and_weights_that_are_not_finite_are_said() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (model(root.path())?, faces(root.path(), 2, 2)?);
    let file = read_safetensors(&model)?;
    type Change = fn(&Tensor) -> candle_core::Result<Tensor>;
    let changes: [(&str, &str, Change, bool); 4] = [
        ("zero", "features.weight", |t| t.zeros_like(), false),
        ("nan", "fc.weight", |t| t * f64::NAN, true),
        ("infinite", "features.running_var", |t| t * f64::INFINITY, true),
        ("overflowing", "fc.weight", |t| t * 1e38, false),
    ];
    for (name, tensor, change, is_said) in changes {
        let mut tensors = file.tensors.clone();
        tensors.insert(tensor.to_owned(), change(&tensors[tensor])?);
        if name == "zero" {
            tensors.insert("features.bias".to_owned(), tensors["features.bias"].zeros_like()?);
        }
        let path = root.path().join(format!("{name}.safetensors"));
        write_safetensors(&path, &tensors, &file.metadata)?;
        let error = refused(&["embed", str(&path), str(&faces)])?;
        assert!(error.contains("has no length to scale to 1") || error.contains("expected finite"), "{name}: {error}");
        let (text, _) = run(&["info", str(&path)])?;
        assert_eq!(text.contains("have values that are not finite"), is_said, "{name}: {text}");
        let (_, said) = run(&["convert", str(&path), str(&root.path().join(format!("{name}.onnx")))])?;
        assert_eq!(said.contains("have values that are not finite"), is_said, "{name}: {said}");
    }
    Ok(())
}

#[test]
fn scores_are_joined_by_the_names_of_the_images() -> Result<()> {
    let root = tempfile::tempdir()?;
    let rows: Vec<String> =
        (0..40).map(|i| format!("/a/x{i}.jpg,/a/y{i}.jpg,{},0.{:02}", i % 2, (i * 37) % 100)).collect();
    let write = |name: &str, rows: &[String]| -> Result<PathBuf> {
        let path = root.path().join(name);
        std::fs::write(&path, format!("image_a,image_b,is_same,score\n{}\n", rows.join("\n")))?;
        Ok(path)
    };
    let first = write("a.csv", &rows)?;
    let mut turned = rows.clone();
    turned.rotate_left(14);
    let turned = write("b.csv", &turned)?;
    let (text, _) = run(&["compare", str(&first), str(&turned), "--json"])?;
    let json: serde_json::Value = serde_json::from_str(&text)?;
    let figures = json["comparisons"][0]["figures"].as_array().context("figures")?;
    assert!(figures.len() > 2);
    for figure in figures {
        let interval = &figure["differences"][0]["interval"];
        assert_eq!((&interval["low"], &interval["high"]), (&0.0.into(), &0.0.into()), "{figure}");
    }
    let others: Vec<String> = rows.iter().map(|row| row.replace("x3.jpg", "z3.jpg")).collect();
    let error = refused(&["compare", str(&first), str(&write("c.csv", &others)?)])?;
    assert!(error.contains("expected pair 4 of the first file"), "{error}");
    Ok(())
}

#[test]
fn metrics_of_groups_and_of_distances_say_what_is_amiss_and_print_the_rest() -> Result<()> {
    let root = tempfile::tempdir()?;
    let path = root.path().join("groups.csv");
    let rows = |sign: f64| {
        let row = |i: usize| {
            let is_same = i.is_multiple_of(2);
            let score = sign * (if is_same { 0.7 } else { 0.2 } + 0.01 * (i % 20) as f64);
            format!("{score},{},{}\n", if is_same { "1.0" } else { "False" }, if i < 60 { "x,x" } else { "y,y" })
        };
        "score,is_same,group_a,group_b\n".to_owned() + &(0..200).map(row).collect::<String>()
    };
    std::fs::write(&path, rows(1.0))?;
    let (text, said) = run(&["metrics", str(&path), "--bootstrap", "0"])?;
    assert!(text.contains("EER") && said.contains("no figures by group, see --group-fmr"), "{text}{said}");
    let (text, said) = run(&["metrics", str(&path), "--bootstrap", "0", "--group-fmr", "0.1"])?;
    assert!(text.contains("by group") && !said.contains("distances"), "{text}{said}");
    std::fs::write(&path, rows(-1.0))?;
    let (_, said) = run(&["metrics", str(&path), "--bootstrap", "0"])?;
    assert!(said.contains("are they distances? Negate them"), "{said}");
    Ok(())
}

#[test]
fn settings_that_cannot_mean_what_they_say_are_refused_by_name() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 6, 3)?;
    let train = |flags: &[&str]| refused(&[&["train", "--data", str(&faces), "--arm", "aug"][..], flags].concat());
    for (flags, words) in [
        (&["--batch-size", "0"][..], "loader.batch_size: expected 2 to 65536, found 0"),
        (&["--seed", "9223372036854775808"], "train.seed: expected up to 9223372036854775807"),
        (&["--set", "train.arms=[\"aug\",\"lg\",\"aug\"]"], "train.arms: expected each arm once, found aug again"),
        (&["--set", "data.test_share=0.2"], "--set data.test_share=0.5"),
    ] {
        let error = train(flags)?;
        assert!(error.contains(words), "{flags:?}: {error}");
    }
    let photo = root.path().join("photo.png");
    RgbImage::new(300, 200).save(&photo)?;
    let outside = "400,80,460,80,430,110,410,140,450,140";
    let masked = root.path().join("masked.png");
    let error = refused(&["mask", str(&photo), str(&masked), "--landmarks", outside])?;
    assert!(error.contains("expected points inside") && error.contains("300x200 pixels, found 400,80"), "{error}");
    Ok(())
}

#[test]
fn paths_of_a_run_hold_from_any_folder_and_emptied_settings_are_an_error() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (data, out) = (faces(root.path(), 8, 4)?, root.path().join("out"));
    let train = |data: &str| {
        Command::new(env!("CARGO_BIN_EXE_maskinv"))
            .args(["train", "--data", data, "--arm", "aug", "--out", str(&out), "--resume", "auto", "--epochs", "1"])
            .args(["--set", "model.width=0.125", "--set", "model.input_size=32", "--batch-size", "8"])
            .current_dir(root.path())
            .output()
    };
    for data in ["faces", "./faces", str(&data), "faces/"] {
        let output = train(data)?;
        assert!(output.status.success(), "{data}: {}", String::from_utf8_lossy(&output.stderr));
    }
    // From another folder, with the settings that it wrote.
    run(&["evaluate", str(&out.join("aug")), "--bootstrap", "0"])?;
    let config = out.join("config.toml");
    let whole = std::fs::read_to_string(&config)?;
    // The same images elsewhere are the same data; others are not.
    let moved = root.path().join("moved");
    std::fs::rename(&data, &moved)?;
    let (_, said) = run(&["train", "--resume", str(&out), "--data", str(&moved)])?;
    assert!(said.contains("already trained"), "{said}");
    assert!(std::fs::read_to_string(&config)?.contains("moved\""));
    std::fs::rename(moved.join("p0"), moved.join("zoe"))?;
    let error = refused(&["train", "--resume", str(&out)])?;
    assert!(error.contains("expected the data that it was begun with"), "{error}");
    let without = |key: &str| whole.lines().filter(|line| !line.starts_with(key)).collect::<Vec<_>>().join("\n");
    std::fs::write(&config, without("arms"))?;
    let error = refused(&["train", "--resume", str(&out)])?;
    assert!(error.contains("expected all settings of a training, found no train.arms"), "{error}");
    for cut in ["", &whole[..whole.len() / 2]] {
        std::fs::write(&config, cut)?;
        let error = refused(&["train", "--resume", str(&out)])?;
        assert!(error.contains("config.toml: "), "{error}");
    }
    Ok(())
}

/// The records of a training go on when nobody reads what it says.
#[cfg(unix)]
#[test]
fn a_closed_standard_error_does_not_end_a_training() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (faces, out) = (faces(root.path(), 8, 4)?, root.path().join("out"));
    let script = "exec \"$@\" 2>&-";
    let output = Command::new("bash")
        .args(["-c", script, "bash", env!("CARGO_BIN_EXE_maskinv"), "train", "--data", str(&faces), "--arm", "aug"])
        .args(["--out", str(&out), "--epochs", "1", "--batch-size", "8"])
        .args(["--set", "model.width=0.125", "--set", "model.input_size=32"])
        .output()?;
    assert!(output.status.success() && out.join("aug/backbone.safetensors").exists());
    Ok(())
}

/// What an evaluation writes appears once it is complete, beside what is there. A limit on the size of files takes the
/// place of a full disk.
#[cfg(target_os = "linux")]
#[test]
fn an_evaluation_that_fails_leaves_and_takes_nothing() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (model(root.path())?, faces(root.path(), 4, 3)?);
    let (out, mine) = (root.path().join("new/out"), root.path().join("mine"));
    std::fs::create_dir(&mine)?;
    std::fs::write(mine.join("notes"), "mine")?;
    let base = ["evaluate", str(&model), "--data", str(&faces), "--set", "data.test_share=0.5", "--bootstrap", "0"];
    let before = names(root.path())?;
    for folder in [&out, &mine] {
        let script = "trap '' XFSZ; ulimit -f 1; exec \"$@\"";
        let output = Command::new("bash")
            .args(["-c", script, "bash", env!("CARGO_BIN_EXE_maskinv")])
            .args([&base[..], &["--report", str(folder)]].concat())
            .output()?;
        assert!(!output.status.success());
        assert_eq!((names(root.path())?, names(&mine)?), (before.clone(), vec!["notes".to_owned()]));
    }
    run(&[&base[..], &["--report", str(&mine)]].concat())?;
    assert!(mine.join("report.html").is_file() && mine.join("scores").is_dir() && mine.join("notes").is_file());
    let again = refused(&[&base[..], &["--report", str(&mine)]].concat())?;
    assert!(again.contains("already exists"), "{again}");
    Ok(())
}

#[test]
fn images_that_would_share_an_output_are_refused_and_changed_inputs_begin_anew() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 1, 1)?;
    let (from, out) = (faces.join("p0"), root.path().join("out"));
    std::fs::copy(from.join("p0_0001.jpg"), from.join("a.jpg"))?;
    let image = image::open(from.join("a.jpg"))?;
    image.save(from.join("a.pgm"))?;
    image.save(from.join("a.png"))?;
    let args = ["mask", str(&from), str(&out)];
    for wrong in [from.join("sub"), root.path().join("out.png")] {
        refused(&["mask", str(&from), str(&wrong)])?;
        assert!(!wrong.exists());
    }
    let output = maskinv(&args)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("would both be written to one file"), "{said}");
    std::fs::remove_file(from.join("a.png"))?;
    // What an interrupted command left of other inputs.
    let unfinished = root.path().join(".maskinv-unfinished-out");
    std::fs::create_dir(&unfinished)?;
    std::fs::write(unfinished.join(".maskinv-key"), "of other images")?;
    std::fs::write(unfinished.join("a.jpg"), "old")?;
    run(&args)?;
    assert_eq!(names(&out)?, ["a.jpg", "a.png", "p0_0001.jpg"]);
    assert!(image::open(out.join("a.jpg")).is_ok());
    // Beside what is there nothing is overwritten, and nothing is begun.
    std::fs::remove_file(out.join("a.jpg"))?;
    let output = maskinv(&args)?;
    assert!(!output.status.success() && !out.join("a.jpg").exists());
    Ok(())
}

/// Codes that no JPEG has leave an image that decodes, to something else from there on.
#[test]
fn damaged_jpegs_are_found_by_a_check() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 2, 2)?;
    let check = ["data", "check", str(&faces), "--json"];
    let damaged = || -> Result<usize> {
        let findings: serde_json::Value = serde_json::from_str(&stdout(&maskinv(&check)?))?;
        Ok(findings["findings"]["damaged"].as_array().context("a list")?.len())
    };
    assert_eq!(damaged()?, 0);
    let path = faces.join("p1/p1_0002.jpg");
    let mut bytes = std::fs::read(&path)?;
    let middle = bytes.len() / 2;
    // In the compressed data, ones alone are no code; a byte of ones has a zero byte after it.
    bytes[middle..middle + 300].iter_mut().zip([0xff, 0].into_iter().cycle()).for_each(|(byte, new)| *byte = new);
    std::fs::write(&path, bytes)?;
    assert_eq!(damaged()?, 1);
    let output = maskinv(&["data", "check", str(&faces)])?;
    let text = stdout(&output);
    assert!(output.status.code() == Some(1) && text.contains("1 damaged") && text.contains("p1_0002.jpg"), "{text}");
    Ok(())
}
