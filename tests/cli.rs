//! The `maskinv` command: what it prints, what it refuses, and with which exit code.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::Result;
use image::RgbImage;

/// A tiny training run: 6 people, an eighth of ResNet-18 at 32 pixels.
pub const TINY: &[&str] = &[
    "--set",
    "train.epochs=1",
    "--set",
    "train.teacher_epochs=1",
    "--set",
    "model.width=0.125",
    "--set",
    "model.embedding_size=16",
    "--set",
    "model.input_size=32",
    "--set",
    "loader.batch_size=8",
    "--set",
    "data.test_share=0.4",
    "--set",
    "train.teacher=none",
    "--set",
    "data.procedural_teacher=none",
    "--set",
    "data.procedural.num_identities=20",
    "--set",
    "data.procedural.images_per_identity=8",
    "--set",
    "data.procedural_test.num_identities=10",
];

pub fn maskinv(args: &[&str]) -> Result<Output> {
    Ok(Command::new(env!("CARGO_BIN_EXE_maskinv")).args(args).env("RUST_BACKTRACE", "1").output()?)
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The error must be one line, exit code 1, and nothing on stdout.
pub fn refused(args: &[&str]) -> Result<String> {
    let output = maskinv(args)?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
    assert!(output.stdout.is_empty(), "{args:?} printed {}", stdout(&output));
    let lines: Vec<&str> = error.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 1, "{args:?}: {error}");
    assert!(error.ends_with(&format!("{}\n", lines[0])), "{args:?}: the error is the last line of {error}");
    Ok(lines[0].to_owned())
}

/// A folder of `people` identities with `images` crops each.
pub fn faces(root: &Path, people: usize, images: usize) -> Result<PathBuf> {
    let folder = root.join("faces");
    for person in 0..people {
        std::fs::create_dir_all(folder.join(format!("p{person}")))?;
        for i in 0..images {
            let (a, b) = ((30 * person) as u8, (9 * i) as u8);
            let image = RgbImage::from_fn(112, 112, |x, y| image::Rgb([a.wrapping_add(x as u8), b, y as u8]));
            image.save(folder.join(format!("p{person}/p{person}_{:04}.jpg", i + 1)))?;
        }
    }
    Ok(folder)
}

pub fn str(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

#[test]
fn train_evaluate_and_json_agree_on_a_folder() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (faces, out) = (faces(root.path(), 8, 4)?, root.path().join("out"));
    let train = [&["train", "--data", str(&faces), "--out", str(&out)][..], TINY].concat();
    let output = maskinv(&train)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = stdout(&output);
    for words in ["teacher ", "augmentation only", "MaskInv-LG", "MaskInv-HG", "U-M", "EER: lower is better"] {
        assert!(text.contains(words), "{words} is not in {text}");
    }
    assert!(refused(&train)?.contains("is not empty"), "results are not overwritten unasked");

    let results: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("results.json"))?)?;
    let hg = out.join("hg");
    let output = maskinv(&["evaluate", str(&hg), "--json"])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let evaluated: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(evaluated["models"][str(&hg)]["settings"], results["arms"]["hg"]["settings"]);

    // MFR2's format: genuine pairs first.
    let pairs = root.path().join("pairs.txt");
    let same = (0..8).map(|p| format!("p{p} 1 2\np{p} 2 3\n")).collect::<String>();
    let different =
        (0..8).map(|p| format!("p{p} 1 p{} 3\np{p} 4 p{} 2\n", (p + 1) % 8, (p + 3) % 8)).collect::<String>();
    std::fs::write(&pairs, same + &different)?;
    let output = maskinv(&["evaluate", str(&hg), "--data", str(&faces), "--pairs", str(&pairs), "--json"])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listed: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let uu = &listed["models"][str(&hg)]["settings"]["U-U"];
    assert_eq!((&uu["num_genuine"], &uu["num_impostor"]), (&16.into(), &16.into()));
    let at = |i: usize| [&uu["at_unmasked_fmr"][i]["fmr_target"], &uu["at_unmasked_fmr"][i]["fnmr"]];
    assert!(at(0)[0] == 0.1 && at(0)[1].is_f64());
    assert_eq!(at(1), [&0.01.into(), &serde_json::Value::Null], "16 impostor pairs cannot show an FMR of 1 %");
    let (low, eer) = (uu["intervals"]["eer"]["low"].as_f64(), uu["eer"].as_f64());
    assert!(low.is_some() && low <= eer, "{uu}");
    Ok(())
}

#[test]
fn a_training_gives_the_same_bytes_on_one_thread_and_on_three() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 8, 4)?;
    let train = |threads: &str, loaders: &str| -> Result<Vec<u8>> {
        let (out, loaders) = (root.path().join(threads), format!("loader.threads={loaders}"));
        let flags = ["--arm", "aug", "--threads", threads, "--set", &loaders];
        let output = maskinv(&[&["train", "--data", str(&faces), "--out", str(&out)][..], TINY, &flags].concat())?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(std::fs::read(out.join("aug/backbone.safetensors"))?)
    };
    assert!(train("1", "1")? == train("3", "2")?);
    Ok(())
}

#[test]
fn bad_input_is_one_line_that_says_what_and_where() -> Result<()> {
    let root = tempfile::tempdir()?;
    let out = root.path().join("out");
    let faces = faces(root.path(), 6, 3)?;
    let train =
        |data: &Path| refused(&[&["train", "--data", str(data), "--out", str(&out), "--overwrite"][..], TINY].concat());

    let one = root.path().join("one");
    std::fs::create_dir_all(one.join("p0"))?;
    RgbImage::new(112, 112).save(one.join("p0/p0_0001.png"))?;
    let error = train(&one)?;
    assert!(error.contains("one: expected enough identities to train and to test, found 1"), "{error}");

    let missing = root.path().join("nowhere");
    let error = train(&missing)?;
    assert!(error.contains("nowhere: expected a data set, found nothing there"), "{error}");

    let jpeg = faces.join("p2/p2_0002.jpg");
    let whole = std::fs::read(&jpeg)?;
    for (bytes, words) in [
        (&whole[..whole.len() / 2], "p2_0002.jpg: "),
        (&b"not a picture"[..], "p2_0002.jpg: expected JPEG, PNG, WebP, BMP or PNM, found an unknown format"),
    ] {
        // Whether training or testing needs it: no image is skipped silently.
        std::fs::write(&jpeg, bytes)?;
        let error = train(&faces)?;
        assert!(error.contains(words), "{error}");
    }
    RgbImage::new(96, 112).save_with_format(&jpeg, image::ImageFormat::Jpeg)?;
    let error = train(&faces)?;
    assert!(error.contains("p2_0002.jpg: expected 112x112 pixels, found 96x112"), "{error}");
    std::fs::write(&jpeg, &whole)?;

    let lfw = root.path().join("lfw");
    std::fs::create_dir(&lfw)?;
    std::fs::rename(&faces, lfw.join("images"))?;
    std::fs::write(lfw.join("people.txt"), "3\n2\np0\t3\np1\t3\n2\np2\t3\np3\t3\n2\np4\t3\np5\t3\n")?;
    std::fs::write(
        lfw.join("pairs.txt"),
        "3\t1\np0\t1\t2\np0\t1\tp1\t2\np2\t1\t2\np2\t1\tp3\t1\np4\t1\t9\np4\t1\tp5\t1\n",
    )?;
    let folds = ["--set", "data.train_folds=[1]", "--set", "data.test_folds=[2,3]"];
    let error =
        refused(&[&["train", "--data", str(&lfw), "--out", str(&out), "--overwrite"][..], TINY, &folds].concat())?;
    assert!(error.contains("pairs.txt:6: expected image 9 of p4"), "{error}");
    Ok(())
}

#[test]
fn bad_settings_and_checkpoints_are_refused() -> Result<()> {
    let root = tempfile::tempdir()?;
    let config = root.path().join("typo.toml");
    std::fs::write(&config, "[optim]\nlearning_rate = 1\n")?;
    let error = refused(&["train", "--config", str(&config)])?;
    assert!(error.contains("typo.toml: line 2: unknown field `learning_rate`"), "{error}");
    let error = refused(&["train", "--preset", "nothing"])?;
    assert!(error.contains("no preset nothing; there are procedural"), "{error}");
    let error = refused(&["train", "--preset", "ms1mv2-r100-lg"])?;
    assert!(error.contains("this recipe is for real faces"), "{error}");
    let error = refused(&["evaluate", str(&root.path().join("no.safetensors"))])?;
    assert!(error.contains("no.safetensors: No such file or directory"), "{error}");

    let (faces, out) = (faces(root.path(), 6, 3)?, root.path().join("out"));
    let train = [&["train", "--data", str(&faces), "--arm", "teacher", "--out", str(&out)][..], TINY].concat();
    assert!(maskinv(&train)?.status.success());
    let teacher = out.join("teacher");
    let other = root.path().join("other");
    let start = ["--start", str(&teacher), "--set", "model.arch=r34"];
    let args = [&["train", "--data", str(&faces), "--arm", "aug", "--out", str(&other)][..], TINY, &start].concat();
    let error = refused(&args)?;
    assert!(error.contains("teacher/backbone.safetensors: does not fit the model: expected"), "{error}");
    assert!(error.contains("expected model.arch = \"r34\", found \"r18\""), "{error}");
    Ok(())
}

#[test]
fn wrong_usage_exits_with_2_and_help_with_0() -> Result<()> {
    for args in
        [&["train", "--epochs", "many"][..], &["evaluate"], &["paint"], &["mask", "a", "b", "--kind", "tuxedo"], &[]]
    {
        assert_eq!(maskinv(args)?.status.code(), Some(2), "{args:?}");
    }
    for args in [&["--help"][..], &["train", "--help"], &["evaluate", "--help"], &["mask", "--help"], &["--version"]] {
        let output = maskinv(args)?;
        assert!(output.status.success() && !output.stdout.is_empty(), "{args:?}");
    }
    let presets = stdout(&maskinv(&["train", "--list-presets"])?);
    assert!(presets.contains("procedural") && presets.contains("ms1mv2-r100-hg"), "{presets}");
    let shown = stdout(&maskinv(&["train", "--preset", "casia-r50", "--data", "x", "--lr", "0.05", "--show-config"])?);
    assert!(shown.contains("lr = 0.05") && shown.contains("arch = \"r50\""), "{shown}");
    let args = ["train", "--preset", "ms1mv3-r100-auraface", "--data", "x", "--unlabelled", "/more", "--show-config"];
    let shown = stdout(&maskinv(&args)?);
    assert!(shown.contains("unlabelled = \"/more\"") && shown.contains("teacher = \"auraface-v1\""), "{shown}");
    Ok(())
}

#[test]
fn mask_masks_files_folders_and_sheets() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 2, 2)?;
    let (input, output) = (faces.join("p0/p0_0001.jpg"), root.path().join("masked.png"));
    let args = ["mask", str(&input), str(&output), "--kind", "surgical", "--colour", "white"];
    assert!(maskinv(&args)?.status.success());
    let (clean, masked) = (image::open(&input)?.into_rgb8(), image::open(&output)?.into_rgb8());
    assert_eq!(clean.get_pixel(38, 51), masked.get_pixel(38, 51), "the eye is free");
    assert_ne!(clean.get_pixel(56, 90), masked.get_pixel(56, 90), "the mouth is covered");
    assert!(refused(&args)?.contains("masked.png: exists already"));

    let folder = root.path().join("masked");
    assert!(maskinv(&["mask", str(&faces), str(&folder)])?.status.success());
    assert!(folder.join("p1/p1_0002.jpg").exists());
    let sheet = root.path().join("sheet.png");
    assert!(maskinv(&["mask", str(&faces), str(&sheet), "--sheet"])?.status.success());
    assert_eq!(image::image_dimensions(&sheet)?, (9 * 112, 4 * 112));
    let equal = root.path().join("equal");
    assert!(maskinv(&["mask", str(&faces), str(&equal), "--mix", "equal", "--threads", "1"])?.status.success());
    assert_ne!(std::fs::read(equal.join("p1/p1_0002.jpg"))?, std::fs::read(folder.join("p1/p1_0002.jpg"))?);
    let often = maskinv(&["mask", str(&faces), str(&equal), "--mix", "often"])?;
    assert!(String::from_utf8_lossy(&often.stderr).contains("expected `worn` or `equal`"), "{often:?}");

    let photo = root.path().join("photo.png");
    RgbImage::new(300, 200).save(&photo)?;
    let other = root.path().join("other.png");
    let error = refused(&["mask", str(&photo), str(&other)])?;
    assert!(error.contains("is no aligned crop of 112x112 but 300x200 pixels"), "{error}");
    let landmarks = "100,80,160,80,130,110,110,140,150,140";
    assert!(maskinv(&["mask", str(&photo), str(&other), "--landmarks", landmarks])?.status.success());
    let error = refused(&["mask", str(&photo), str(&sheet), "--landmarks", "1,2,3"])?;
    assert!(error.contains("expected 10 numbers, found 3"), "{error}");
    Ok(())
}

pub fn example(name: &str, args: &[&str]) -> Result<Output> {
    let path = Path::new(env!("CARGO_BIN_EXE_maskinv")).with_file_name("examples").join(name);
    let output = Command::new(&path).args(args).output();
    let output = output.map_err(|e| anyhow::anyhow!("{}: {e}; `cargo test` builds it", path.display()))?;
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

#[test]
#[ignore = "heavy: it takes most of a minute; .ci/run runs it"]
fn heavy_the_examples_run() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (faces, out) = (faces(root.path(), 8, 3)?, root.path().join("out"));
    let train = [&["--data", str(&faces), "--arm", "aug", "--out", str(&out)][..], TINY].concat();
    let text = stdout(&example("train", &train)?);
    assert!(text.contains("augmentation only") && out.join("aug/backbone.safetensors").exists(), "{text}");

    let text = stdout(&example("evaluate", &[str(&out.join("aug"))])?);
    assert!(text.contains("unseen procedural identities") && text.contains("FMR100 %"), "{text}");

    let (face, masked, sheet) =
        (faces.join("p0/p0_0001.jpg"), root.path().join("masked.png"), root.path().join("sheet.png"));
    example("mask", &[str(&face), str(&masked)])?;
    assert_ne!(image::open(&face)?.into_rgb8(), image::open(&masked)?.into_rgb8());
    let onnx = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/onnx/torch_mbf.onnx");
    let text = stdout(&example("verify", &[onnx, str(&face), str(&face), "0.9"])?);
    assert!(text.contains("cosine 1.0000") && text.contains("the same person"), "{text}");
    let text = stdout(&example("custom_loss", &["3"])?);
    assert!(text.contains("step 2: loss ") && text.contains("EER of unseen people"), "{text}");
    let (others, tuned) = (self::faces(&root.path().join("others"), 30, 5)?, root.path().join("tuned"));
    let text = stdout(&example("fine_tune", &[str(&out.join("aug")), str(&others), str(&tuned)])?);
    assert!(text.contains("the best so far") && text.contains("is what it learned"), "{text}");
    let text = stdout(&example("download", &[onnx])?);
    assert!(text.contains("MobileFaceNet (linear head)") && text.contains("RGB, (x - 127.5) / 127.5"), "{text}");
    for work in [&["infer", "mbf", "1"][..], &["margin", "4", "50", "16"]] {
        let text = stdout(&example("peers_worker", &[work, &["--profile", "1"]].concat())?);
        assert!(text.contains("ms, peak"), "{text}");
    }
    example("faces", &[str(&sheet)])?;
    assert_eq!(image::image_dimensions(&sheet)?, (8 * 112, 8 * 112));
    example("faces", &[str(&sheet), "--photo"])?;
    assert_eq!(image::image_dimensions(&sheet)?, (720, 400));
    Ok(())
}

#[test]
fn a_device_that_is_not_there_is_an_error_of_one_line() -> Result<()> {
    let error = refused(&["embed", "no.onnx", "no.jpg", "--device", "cuda:77"])?;
    let says = [
        "this build lacks the feature cudnn; install it with: cargo install --path . --features cudnn",
        "no CUDA driver",
        "cuBLAS is missing",
        "no GPU 77",
        "no usable CUDA driver",
    ];
    assert!(says.iter().any(|what| error.contains(what)), "{error}");
    let wrong = maskinv(&["embed", "no.onnx", "no.jpg", "--device", "gpu"])?;
    let text = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert!(wrong.status.code() == Some(2) && text.contains("expected auto, cpu, cuda or cuda:N"), "{text}");
    Ok(())
}
