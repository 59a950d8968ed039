//! Reports, protocols, thresholds: `maskinv evaluate --report`, `compare`, `calibrate` and `verify`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use maskinv::data::{ALIGNED_LANDMARKS, Dataset, ProceduralConfig, ProceduralFaces};
use maskinv::models::{Arch, Model, ModelConfig, save_model};
use serde_json::Value;

use crate::cli::{faces, maskinv, refused, stdout, str};

/// A small network that has learned nothing.
fn model(root: &Path, name: &str, seed: u64) -> Result<PathBuf> {
    let config =
        ModelConfig { arch: Arch::R18, width: 0.125, embedding_size: 16, input_size: 32, ..Default::default() };
    let path = root.join(name);
    save_model(&path, &Model::new(&config, &Device::Cpu, seed)?, DType::F32)?;
    Ok(path)
}

fn run(args: &[&str]) -> Result<String> {
    let output = maskinv(args)?;
    anyhow::ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(stdout(&output))
}

fn json(args: &[&str]) -> Result<Value> {
    Ok(serde_json::from_str(&run(args)?)?)
}

#[test]
fn a_report_says_all_in_one_page_and_is_compared_with_another() -> Result<()> {
    let root = tempfile::tempdir()?;
    let [a, b] = [model(root.path(), "a.safetensors", 0)?, model(root.path(), "b <i>.safetensors", 1)?];
    let (faces, out) = (faces(root.path(), 6, 4)?, root.path().join("out"));
    let evaluate =
        ["evaluate", str(&a), str(&b), "--data", str(&faces), "--set", "data.test_share=0.9", "--bootstrap", "100"];
    let text = run(&[&evaluate[..], &["--report", str(&out), "--faces", "2"]].concat())?;
    assert!(text.contains("EER %") && text.contains("U-M"), "{text}");

    let report: Value = serde_json::from_slice(&std::fs::read(out.join("report.json"))?)?;
    let of_a = &report["models"][str(&a)];
    assert_eq!(of_a["sha256"].as_str().map(str::len), Some(64));
    assert_eq!(report["test_set_sha256"].as_str().map(str::len), Some(64));
    let curve = report["curves"][str(&a)]["M-M"]["curve"].as_array().context("a curve")?;
    assert!(curve.len() > 2 && curve[curve.len() - 1]["fmr"] == 1.0, "{curve:?}");
    assert_eq!(report["config"]["eval"]["bootstrap"]["replicates"], 100);

    let page = std::fs::read_to_string(out.join("report.html"))?;
    for part in
        ["<svg", "DET", "ROC", "U-M: scores", "data:image/jpeg;base64,", "hardest pairs of two people", "model SHA-256"]
    {
        assert!(page.contains(part), "{part} is missing");
    }
    // Nothing is loaded, nothing runs, and a name is not taken for markup.
    assert!(!page.contains("<script") && !page.contains("<i>") && page.contains("b &lt;i&gt;.safetensors"));
    let elsewhere = page.match_indices("http").filter(|(at, _)| !page[*at..].starts_with("http://www.w3.org/2000/svg"));
    assert_eq!(elsewhere.count(), 0);
    let markdown = std::fs::read_to_string(out.join("report.md"))?;
    assert!(markdown.contains("| EER % |") && markdown.contains("100 bootstrap resamples of"), "{markdown}");

    // The same figures from the scores beside it.
    let scores = out.join(report["curves"][str(&a)]["U-U"]["scores"].as_str().context("a file of scores")?);
    let figures = json(&["metrics", str(&scores), "--bootstrap", "100", "--json"])?;
    assert_eq!(figures["figures"]["eer"], of_a["settings"]["U-U"]["eer"]);
    assert_eq!(figures["figures"]["intervals"], of_a["settings"]["U-U"]["intervals"]);

    let again = refused(&[&evaluate[..], &["--report", str(&out)]].concat())?;
    assert!(again.contains("a report already exists"), "{again}");

    let compared = json(&["compare", str(&out), "--bootstrap", "100", "--json"])?;
    let comparisons = compared["comparisons"].as_array().context("a list")?;
    assert_eq!(comparisons.len(), 4);
    let eer = &comparisons[0]["figures"][0];
    assert_eq!(eer["values"][0], of_a["settings"]["U-U"]["eer"]);
    assert!(eer["differences"][0]["p_value"].is_number(), "{eer}");
    // The systems of two reports, one of which has lost its scores.
    assert_eq!(comparisons[2]["setting"], "M-U");
    let second = root.path().join("second");
    run(&["evaluate", str(&a), "--data", str(&faces), "--set", "data.test_share=0.9", "--report", str(&second)])?;
    std::fs::remove_dir_all(second.join("scores"))?;
    let text = run(&["compare", str(&second.join("report.json")), str(&out), "--bootstrap", "100"])?;
    assert!(text.contains("differences are not tested: no scores beside the report of"), "{text}");
    assert!(refused(&["compare", str(&second)])?.contains("expected two systems"));
    assert!(refused(&["compare", str(&out), str(&scores)])?.contains("found both"));
    // Other masks on the same images are no difference between systems.
    let other = root.path().join("other");
    run(&[&evaluate[..], &["--report", str(&other), "--set", "eval.seed=5"]].concat())?;
    let error = refused(&["compare", str(&out), str(&other), "--bootstrap", "100"])?;
    assert!(error.contains("expected the same masks, found eval.seed = 0 and 5"), "{error}");
    std::fs::write(second.join("report.json"), "{\"models\": 3}")?;
    assert!(refused(&["compare", str(&second), str(&out)])?.contains("expected a report of maskinv evaluate"));
    Ok(())
}

#[test]
fn all_pairs_are_compared_once_with_real_and_with_drawn_masks() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (model(root.path(), "a.safetensors", 0)?, faces(root.path(), 5, 3)?);
    let worn = root.path().join("worn.csv");
    // One photo of each person with a mask.
    let rows = (0..5).flat_map(|p| (1..=3).map(move |i| format!("p{p}/p{p}_000{i}.jpg,{}\n", u8::from(i == 3))));
    std::fs::write(&worn, format!("file,masked\n{}", rows.collect::<String>()))?;
    let base =
        ["evaluate", str(&model), "--data", str(&faces), "--protocol", "all-pairs", "--bootstrap", "100", "--json"];
    let num = |found: &Value, setting: &str| {
        let figures = &found["models"][str(&model)]["settings"][setting];
        ["num_genuine", "num_impostor"].map(|kind| figures[kind].as_u64())
    };
    let real = json(&[&base[..], &["--worn", str(&worn)]].concat())?;
    // 10 unmasked images, two a person; 5 masked ones, which have no genuine pair among themselves.
    assert_eq!(num(&real, "U-U"), [Some(5), Some(40)]);
    assert_eq!(num(&real, "U-M"), [Some(10), Some(40)]);
    assert_eq!(num(&real, "M-M"), [None, None]);
    // 15 images without and with a mask, none with itself.
    let drawn = json(&base)?;
    assert_eq!(num(&drawn, "U-M"), [Some(30), Some(180)]);
    assert_eq!(num(&drawn, "M-M"), [Some(15), Some(90)]);
    let report = root.path().join("out");
    let text = run(&[&base[..8], &["--worn", str(&worn), "--report", str(&report), "--faces", "1"]].concat())?;
    assert!(text.contains("5 images with masks"), "{text}");
    assert!(std::fs::read_to_string(report.join("report.html"))?.contains("p0/p0_000"));
    std::fs::write(&worn, "file,masked\np0/p0_0001.jpg,1\n")?;
    let error = refused(&[&base[..], &["--worn", str(&worn)]].concat())?;
    assert!(error.contains("expected a row for p0/p0_0002.jpg"), "{error}");
    let error = refused(&["evaluate", str(&model), "--data", str(&faces), "--worn", str(&worn)])?;
    assert!(error.contains("--worn is for --protocol all-pairs only"), "{error}");

    // LFW's lists say who is tested: two of the five.
    std::fs::write(faces.join("people.txt"), "2\n3\np0\t3\np1\t3\np2\t3\n2\np3\t3\np4\t3\n")?;
    std::fs::write(faces.join("pairs.txt"), "2\t1\np0\t1\t2\np0\t1\tp1\t1\np3\t1\t2\np3\t1\tp4\t1\n")?;
    let of_fold = |fold: &str| [&base[..], &["--set", &format!("data.test_folds=[{fold}]")]].concat().join(" ");
    let tested = json(&of_fold("2").split(' ').collect::<Vec<_>>())?;
    assert_eq!(num(&tested, "U-U"), [Some(6), Some(9)]);
    let description = tested["test_set"].as_str().context("a description")?;
    assert!(description.contains("6 images of the 2 people of folds [2]"), "{description}");
    let error = refused(&of_fold("3").split(' ').collect::<Vec<_>>())?;
    assert!(error.contains("people.txt: expected fold 3, found 2 folds"), "{error}");
    Ok(())
}

/// A set in IJB-C's form of six people with four photos: two of them in the gallery's template, one a probe each.
fn ijb(root: &Path) -> Result<PathBuf> {
    let folder = root.join("IJBC");
    std::fs::create_dir_all(folder.join("meta"))?;
    std::fs::rename(faces(root, 6, 4)?, folder.join("loose_crop"))?;
    let landmarks: String = ALIGNED_LANDMARKS.iter().map(|[x, y]| format!("{x} {y} ")).collect();
    let (mut medias, mut points, mut pairs) = (String::new(), String::new(), String::new());
    let mut lists = ["TEMPLATE_ID,SUBJECT_ID\n"; 3].map(String::from);
    for p in 0..6 {
        for (i, template) in [(1, 10 * p), (2, 10 * p), (3, 10 * p + 1), (4, 10 * p + 2)] {
            let name = format!("p{p}/p{p}_000{i}.jpg");
            medias += &format!("{name} {template} {}\n", 100 * p + i);
            points += &format!("{name} {landmarks}0.9\n");
        }
        lists[p % 2] += &format!("{},{p}\n", 10 * p);
        lists[2] += &format!("{},{p}\n{},{p}\n", 10 * p + 1, 10 * p + 2);
        for q in 0..6 {
            pairs += &format!("{} {} {}\n", 10 * p, 10 * q + 1, u8::from(p == q));
        }
    }
    let [g1, g2, probes] = lists;
    for (name, text) in [
        ("face_tid_mid.txt", medias),
        ("name_5pts_score.txt", points),
        ("template_pair_label.txt", pairs),
        ("1N_gallery_G1.csv", g1),
        ("1N_gallery_G2.csv", g2),
        ("1N_probe_mixed.csv", probes),
    ] {
        std::fs::write(folder.join("meta").join(format!("ijbc_{name}")), text)?;
    }
    Ok(folder)
}

#[test]
fn templates_are_compared_and_searched_for() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, set) = (model(root.path(), "a.safetensors", 0)?, ijb(root.path())?);
    let base = ["evaluate", str(&model), "--data", str(&set), "--protocol", "ijb", "--bootstrap", "100"];
    let found = json(&[&base[..], &["--json"]].concat())?;
    let of_model = &found["models"][str(&model)];
    assert_eq!(
        (&of_model["settings"]["1:1"]["num_genuine"], &of_model["settings"]["1:1"]["num_impostor"]),
        (&6.into(), &30.into())
    );
    for gallery in ["G1", "G2"] {
        let found = &of_model["galleries"][gallery];
        assert_eq!(
            (&found["num_gallery"], &found["num_mated"], &found["num_nonmated"]),
            (&3.into(), &6.into(), &6.into())
        );
        assert_eq!(found["cmc"].as_array().map(Vec::len), Some(3));
    }
    let report = root.path().join("out");
    let text = run(&[&base[..], &["--report", str(&report)]].concat())?;
    for part in [
        "TAR at the closest FAR",
        "G1: 3 people, 6 mated and 6 non-mated searches",
        "rank 1 %",
        "not measurable on 6 non-mated searches",
    ] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
    assert!(std::fs::read_to_string(report.join("report.html"))?.contains("Search in gallery G2"));
    std::fs::remove_file(set.join("loose_crop/p3/p3_0002.jpg"))?;
    assert!(refused(&base)?.contains("p3_0002.jpg: No such file"));
    assert!(refused(&["evaluate", str(&model), "--protocol", "ijb"])?.contains("expected --data"));
    Ok(())
}

#[test]
fn thresholds_are_chosen_kept_with_the_model_and_used() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (plain, faces) = (model(root.path(), "a.safetensors", 0)?, faces(root.path(), 8, 4)?);
    let face = |name: &str| faces.join(name);
    let [one, other] = [face("p0/p0_0001.jpg"), face("p7/p7_0004.jpg")];
    let text = run(&["verify", str(&plain), str(&one), str(&other)])?;
    assert!(text.contains("no threshold: see maskinv calibrate"), "{text}");
    let text = run(&["verify", str(&plain), str(&one), str(&one), "--threshold", "0.99"])?;
    assert!(text.starts_with("cosine 1.0000: same person, at --threshold 0.99"), "{text}");

    let with = root.path().join("with.safetensors");
    let calibrate = ["calibrate", str(&plain), str(&with), "--data", str(&faces), "--set", "data.test_share=0.9"];
    let error = refused(&[&calibrate[..], &["--fmr", "1e-6"]].concat())?;
    assert!(error.contains("--fmr") && error.contains("impostor pairs to measure it") && !with.exists(), "{error}");
    let text = run(&[&calibrate[..], &["--fmr", "0.01", "--fmr", "0.1", "--setting", "U-U"]].concat())?;
    assert!(text.contains("FMR 0.1") && text.contains("on U-U pairs"), "{text}");
    assert!(refused(&calibrate)?.contains("exists"));

    let info = json(&["info", str(&with), "--json"])?;
    let thresholds = info[0]["thresholds"].as_array().context("thresholds")?;
    assert_eq!(thresholds.len(), 2);
    let [loose, strict] = [0, 1].map(|i| thresholds[i]["threshold"].as_f64().unwrap_or(f64::NAN));
    assert!(loose <= strict, "{thresholds:?}");
    let verify = ["verify", str(&with), str(&one), str(&other), "--json"];
    assert_eq!(json(&verify)?["threshold"], thresholds[1]["threshold"]);
    assert_eq!(json(&[&verify[..], &["--fmr", "0.1"]].concat())?["measured"], thresholds[0]);
    let error = refused(&[&verify[..], &["--fmr", "0.5"]].concat())?;
    assert!(error.contains("expected a threshold for FMR 0.5, found those for 0.1, 0.01"), "{error}");
    // Without a mask head nobody knows who wears a mask; `--setting` says so, and without it the strictest is taken.
    let by_setting = root.path().join("by_setting.safetensors");
    let rates = ["--fmr", "0.1", "--mask-head", "0"];
    let calibrate = ["calibrate", str(&plain), str(&by_setting), "--data", str(&faces), "--all-pairs"];
    let text = run(&[&calibrate[..], &["--set", "data.test_share=0.9"], &rates].concat())?;
    for part in ["on U-U pairs of all pairs of faces", "on U-M pairs", "on M-M pairs"] {
        assert!(text.contains(part), "{part} in: {text}");
    }
    let thresholds = json(&["info", str(&by_setting), "--json"])?[0]["thresholds"].clone();
    let of = |setting: &str| {
        let found = thresholds.as_array().into_iter().flatten().find(|found| found["setting"] == setting);
        found.map(|found| found["threshold"].clone()).unwrap_or_default()
    };
    for setting in ["U-U", "U-M", "M-M"] {
        let found = json(&["verify", str(&by_setting), str(&one), str(&other), "--json", "--setting", setting])?;
        assert_eq!((&found["threshold"], &found["masks"]), (&of(setting), &serde_json::Value::Null));
    }
    let output = maskinv(&["verify", str(&by_setting), str(&one), str(&other), "--json"])?;
    let strictest = ["U-U", "U-M", "M-M"].iter().filter_map(|s| of(s).as_f64()).fold(f64::MIN, f64::max);
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout)?["threshold"].as_f64(), Some(strictest));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("no mask head says who wears a mask, so the strictest threshold is taken"), "{said}");
    // They stay with it, in every format.
    let onnx = root.path().join("with.onnx");
    run(&["convert", str(&with), str(&onnx)])?;
    let converted = json(&["info", str(&onnx), "--json"])?;
    assert_eq!(converted[0]["thresholds"], info[0]["thresholds"]);
    assert!(
        converted[0]["mask_head"]["fitted_on"].is_string() && converted[0]["mask_head"] == info[0]["mask_head"],
        "{converted}"
    );
    Ok(())
}

/// Drawn faces, without a mask and with one, and a network that was only initialised: its features suffice.
#[test]
fn a_mask_head_is_fitted_to_any_network_and_used() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (people, images) = (30, 4);
    let drawn = ProceduralFaces::new(ProceduralConfig {
        num_identities: people,
        images_per_identity: images,
        ..ProceduralConfig::default()
    })?;
    let set = root.path().join("set");
    for i in 0..drawn.len() {
        let person = set.join(format!("p{:02}", i / images));
        std::fs::create_dir_all(&person)?;
        drawn.get(i)?.image.save(person.join(format!("{i:03}.png")))?;
    }
    let masked = root.path().join("masked");
    run(&["mask", str(&set), str(&masked), "--aligned", "--seed", "9"])?;
    let config =
        ModelConfig { arch: Arch::R18, width: 0.25, embedding_size: 16, input_size: 112, ..Default::default() };
    let plain = root.path().join("plain.safetensors");
    save_model(&plain, &Model::new(&config, &Device::Cpu, 3)?, DType::F32)?;
    let with = root.path().join("with.safetensors");
    let said = maskinv(&["calibrate", str(&plain), str(&with), "--data", str(&set), "--set", "data.test_share=0.8"])?;
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    assert!(run(&["info", str(&with)])?.contains("  mask head      fitted on 96 faces of "));
    let share = |folder: &Path| -> Result<f64> {
        let table = run(&["embed", str(&with), str(folder)])?;
        let mut rows = csv::Reader::from_reader(table.as_bytes());
        assert_eq!(rows.headers()?.iter().take(3).collect::<Vec<_>>(), ["image", "mask", "e0"]);
        let scores = rows.records().map(|row| Ok(row?[1].parse::<f64>()?)).collect::<Result<Vec<_>>>()?;
        assert!(scores.len() == people * images && scores.iter().all(|score| (0.0..=1.0).contains(score)));
        Ok(scores.iter().filter(|score| **score >= 0.5).count() as f64 / scores.len() as f64)
    };
    let (without, with_mask) = (share(&set)?, share(&masked)?);
    assert!(without < 0.1 && with_mask > 0.9, "{without} of faces without a mask, {with_mask} of those with one");
    // The setting follows from it, and so does the threshold.
    let [face, other] = [&set, &masked].map(|folder| folder.join("p00/000.png"));
    let verify = |a: &Path, b: &Path| json(&["verify", str(&with), str(a), str(b), "--json", "--fmr", "0.1"]);
    for (a, b, setting) in
        [(&face, &face, "U-U"), (&face, &other, "U-M"), (&other, &face, "U-M"), (&other, &other, "M-M")]
    {
        assert_eq!(verify(a, b)?["measured"]["setting"], setting);
    }
    let text = run(&["verify", str(&with), str(&face), str(&other)])?;
    assert!(
        text.contains("000.png: without a mask (score 0.") && text.contains("000.png: with a mask (score "),
        "{text}"
    );
    // Without pixels of its own a model of another size of the same kind refuses the head.
    let mut file = maskinv::weights::read_safetensors(&with)?;
    let head = file.metadata.get_mut("maskinv.mask_head").context("a mask head")?;
    *head = head.replace("\"rows\":7", "\"rows\":6");
    maskinv::weights::write_safetensors(&with, &file.tensors, &file.metadata)?;
    let error = refused(&["info", str(&with)])?;
    assert!(
        error.contains("mask head: expected finite weights of 7 rows and 128 channels, found 896 weights of 6 rows")
    );
    Ok(())
}

#[test]
fn embeddings_that_are_no_numbers_are_an_error() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (path, faces) = (model(root.path(), "a.safetensors", 0)?, faces(root.path(), 6, 4)?);
    let model = maskinv::models::load_model(&path, None)?.model;
    let mut state = model.params().state()?;
    state.insert("features.bias".to_owned(), Tensor::full(f32::NAN, 16, &Device::Cpu)?);
    save_model(&path, &Model::frozen(model.config(), state, &Device::Cpu)?, DType::F32)?;
    for protocol in ["pairs", "all-pairs"] {
        let args =
            ["evaluate", str(&path), "--data", str(&faces), "--set", "data.test_share=0.9", "--protocol", protocol];
        let error = refused(&args)?;
        assert!(error.contains("the embedding of image 1 has no length to scale to 1"), "{error}");
    }
    Ok(())
}
