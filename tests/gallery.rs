//! `maskinv enrol`, `search` and `gallery`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use maskinv::data::{Dataset, ProceduralConfig, ProceduralFaces};
use maskinv::gallery::Gallery;
use maskinv::models::{Arch, Model, ModelConfig, save_model};
use serde_json::Value;

use crate::cli::{example, maskinv, refused, stdout, str};

const PEOPLE: usize = 12;
const IMAGES: usize = 3;

/// A folder of drawn people and a small network.
struct Kit {
    root: tempfile::TempDir,
}

impl Kit {
    fn new() -> Result<Self> {
        let kit = Self { root: tempfile::tempdir()? };
        let config = ProceduralConfig {
            num_identities: PEOPLE,
            images_per_identity: IMAGES,
            nuisance: 0.2,
            ..ProceduralConfig::default()
        };
        let drawn = ProceduralFaces::new(config)?;
        for i in 0..drawn.len() {
            let person = kit.path(&format!("photos/p{:02}", i / IMAGES));
            std::fs::create_dir_all(&person)?;
            drawn.get(i)?.image.save(person.join(format!("{}.png", i % IMAGES)))?;
        }
        kit.model("model.safetensors", 1)?;
        Ok(kit)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn model(&self, name: &str, seed: u64) -> Result<PathBuf> {
        let config =
            ModelConfig { arch: Arch::R18, width: 0.125, embedding_size: 32, input_size: 112, ..Default::default() };
        let path = self.path(name);
        save_model(&path, &Model::new(&config, &Device::Cpu, seed)?, DType::F32)?;
        Ok(path)
    }

    /// Runs a command in the folder.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_maskinv"));
        command.args(args).current_dir(self.root.path());
        command
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let output = self.command(args).output()?;
        anyhow::ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(stdout(&output))
    }

    fn enrol(&self) -> Result<String> {
        self.run(&["enrol", "people.gallery", "photos", "--model", "model.safetensors"])
    }
}

#[test]
fn people_are_enrolled_found_and_removed() -> Result<()> {
    let kit = Kit::new()?;
    assert_eq!(kit.enrol()?, "people.gallery: 36 faces enrolled; 36 faces of 12 people in all\n");
    assert_eq!(kit.enrol()?, "people.gallery: 0 faces enrolled, 36 were there before; 36 faces of 12 people in all\n");
    // The model is found from any folder.
    let gallery = kit.path("people.gallery");
    let search = |image: &str, more: &[&str]| -> Result<Value> {
        let image = kit.path(image);
        let output = maskinv(&[&["search", str(&gallery), str(&image), "--json"][..], more].concat())?;
        anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    for more in [&[][..], &["--column", "f32"], &["--column", "f16"], &["--pool", "mean", "--top", "12"]] {
        let found = search("photos/p04/1.png", more)?;
        let first = &found[0]["candidates"][0];
        assert_eq!(first["person"], "p04", "{more:?}");
        if !more.contains(&"mean") {
            assert!(first["score"].as_f64().context("a score")? > 0.999_999, "{first}");
            assert!(first["face"]["source"].as_str().context("a source")?.ends_with("photos/p04/1.png"));
        }
        let num = found[0]["candidates"].as_array().context("candidates")?.len();
        assert_eq!(num, if more.contains(&"12") { 12 } else { 5 });
    }
    let text = kit.run(&["search", "people.gallery", "photos/p04", "--threshold", "0.5", "--top", "2"])?;
    assert_eq!(text.lines().count(), 9, "{text}");
    assert!(text.contains("   1  1.0000  p04  match, at 0.5000; "), "{text}");
    let said = String::from_utf8(kit.command(&["search", "people.gallery", "photos/p04/0.png"]).output()?.stderr)?;
    assert!(said.contains("no thresholds, so only scores are shown; see maskinv calibrate --all-pairs"), "{said}");

    assert_eq!(
        kit.run(&["enrol", "people.gallery", "photos/p00/0.png", "--person", "Ada Lovelace"])?.lines().count(),
        1
    );
    let listed = kit.run(&["gallery", "list", "people.gallery"])?;
    assert!(listed.starts_with("Ada Lovelace\t1\np00\t3\n"), "{listed}");
    let faces = kit.run(&["gallery", "list", "people.gallery", "p03"])?;
    assert!(faces.starts_with("10\tp03\tphotos/p03/0.png\tan aligned crop, sharpness "), "{faces}");
    assert_eq!(kit.run(&["gallery", "remove", "people.gallery", "p03", "p04"])?, "6 faces removed\n");
    assert_eq!(kit.run(&["gallery", "remove", "people.gallery", "--face", "1"])?, "1 face removed\n");
    assert_ne!(search("photos/p04/1.png", &[])?[0]["candidates"][0]["person"], "p04");
    assert!(kit.run(&["gallery", "compact", "people.gallery"])?.starts_with("smaller by "));
    assert_eq!(kit.run(&["gallery", "check", "people.gallery"])?, "30 faces of 11 people, all whole\n");
    let info: Value = serde_json::from_str(&kit.run(&["gallery", "info", "people.gallery", "--json"])?)?;
    assert_eq!((&info["num_faces"], &info["model"]["embedding_size"]), (&30.into(), &32.into()));

    assert_eq!(kit.run(&["gallery", "export", "people.gallery", "all.npy"])?, "all.npy: 30 faces\n");
    let list = std::fs::read_to_string(kit.path("all.csv"))?;
    assert!(list.starts_with("id,person,source,enrolled,score,side,sharpness,mask\n2,p00,"), "{list}");
    assert_eq!(list.lines().count(), 31);
    let bytes = std::fs::read(kit.path("all.npy"))?;
    assert!(bytes.len() > 30 * 32 * 4 && String::from_utf8_lossy(&bytes[..100]).contains("(30, 32)"));
    if cfg!(feature = "parquet") {
        assert_eq!(kit.run(&["gallery", "export", "people.gallery", "all.parquet"])?, "all.parquet: 30 faces\n");
    }
    Ok(())
}

#[test]
fn what_cannot_be_done_is_said() -> Result<()> {
    let kit = Kit::new()?;
    kit.enrol()?;
    let other = kit.model("other.safetensors", 2)?;
    let (gallery, photos) = (kit.path("people.gallery"), kit.path("photos"));
    let (g, p, o) = (str(&gallery), str(&photos), str(&other));
    let new = kit.path("new.gallery");
    for (args, expected) in [
        (&["search", g, p, "--model", o][..], "expected embeddings of "),
        (&["enrol", g, p, "--model", o], "expected embeddings of "),
        (&["enrol", str(&new), p], "a new gallery: expected --model"),
        (&["search", str(&new), p], "expected a gallery, found no such file; `maskinv enrol` makes one"),
        (&["gallery", "info", o], "expected a gallery, found another file"),
        (&["gallery", "remove", g, "nobody"], "expected a person nobody, found none"),
        (&["gallery", "remove", g, "--face", "99"], "expected a face 99, found none"),
        (&["gallery", "export", g, "x.txt"], "x.txt: expected .npy or .parquet"),
        (&["gallery", "export", g, o], "exists already"),
        (&["enrol", g, "missing"], "missing: No such file"),
        (
            &["enrol", g, &format!("{p}/p00"), &format!("{p}/p01")],
            "person 0: expected one, found files of this name in",
        ),
    ] {
        let error = refused(args)?;
        assert!(error.contains(expected), "{args:?}: {error}");
    }
    assert!(!new.exists());
    // A broken image stops the enrolment, and what was enrolled before stays; left out, it is named.
    std::fs::write(kit.path("photos/p05/broken.png"), b"broken")?;
    let error = refused(&["enrol", g, p])?;
    assert!(error.contains("broken.png"), "{error}");
    let output = kit.command(&["enrol", g, "photos", "--skip-unusable"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains("1 of 37 images left out"), "{said}");
    // The model's file is gone.
    std::fs::remove_file(kit.path("model.safetensors"))?;
    let error = refused(&["search", g, p])?;
    assert!(error.contains("model.safetensors") && error.contains("--model names it elsewhere"), "{error}");
    Ok(())
}

/// Starts an enrolment.
fn enrolment(kit: &Kit, photos: &str) -> Result<Child> {
    let mut command = kit.command(&["enrol", "people.gallery", photos, "--model", "model.safetensors"]);
    Ok(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
}

/// Checks a gallery, if there is one, and returns the number of faces.
fn num_faces(path: &Path) -> Result<usize> {
    if !path.exists() {
        return Ok(0);
    }
    let gallery = Gallery::open(path)?;
    anyhow::ensure!(gallery.check()?.is_empty(), "{:?}", gallery.check()?);
    Ok(gallery.info()?.num_faces)
}

/// Kills enrolments at many moments; each goes on where the one before was.
fn killed(num: u64) -> Result<()> {
    let kit = Kit::new()?;
    let path = kit.path("people.gallery");
    let (mut before, mut num_killed) = (0, 0);
    for i in 0..num {
        let mut child = enrolment(&kit, "photos")?;
        std::thread::sleep(Duration::from_millis(20 + 997 * i % 400));
        num_killed += u32::from(child.try_wait()?.is_none());
        child.kill()?;
        child.wait()?;
        let now = num_faces(&path)?;
        assert!(now >= before, "{now} faces after {before}");
        before = now;
        if before == PEOPLE * IMAGES {
            // The next begins anew.
            for name in ["people.gallery", "people.gallery-wal", "people.gallery-shm"] {
                let _ = std::fs::remove_file(kit.path(name));
            }
            before = 0;
        }
    }
    assert!(num_killed > 0);
    kit.enrol()?;
    assert_eq!(num_faces(&path)?, PEOPLE * IMAGES);
    Ok(())
}

#[test]
fn an_enrolment_that_is_killed_loses_nothing() -> Result<()> {
    killed(6)
}

#[test]
#[ignore = "heavy: fifty processes; .ci/run runs it"]
fn heavy_fifty_enrolments_that_are_killed_lose_nothing() -> Result<()> {
    killed(50)
}

#[test]
fn two_enrolments_at_once_both_succeed() -> Result<()> {
    let kit = Kit::new()?;
    for part in ["a", "b"] {
        std::fs::create_dir(kit.path(part))?;
    }
    for person in 0..PEOPLE {
        let name = format!("p{person:02}");
        std::fs::rename(kit.path("photos").join(&name), kit.path(if person % 2 == 0 { "a" } else { "b" }).join(&name))?;
    }
    let children = [enrolment(&kit, "a")?, enrolment(&kit, "b")?];
    for mut child in children {
        assert!(child.wait()?.success());
    }
    assert_eq!(num_faces(&kit.path("people.gallery"))?, PEOPLE * IMAGES);
    Ok(())
}

#[test]
fn the_example_finds_drawn_people_and_masked_ones_by_the_threshold_that_fits() -> Result<()> {
    let root = tempfile::tempdir()?;
    let path = root.path().join("people.gallery");
    let text = stdout(&example("identify", &[str(&path)])?);
    let rates = |what: &str| -> Result<Vec<f64>> {
        let line = text.lines().find(|line| line.starts_with(what)).with_context(|| format!("{what}: {text}"))?;
        line.split([':', ',']).filter_map(|part| part.trim().split(" %").next()?.parse().ok()).map(Ok).collect()
    };
    let (clean, one) = (rates("probes without masks, the threshold")?, rates("probes with masks, one threshold")?);
    let fits = rates("probes with masks, the threshold")?;
    let [[clean, _], [one, _], [fits, mistaken]] = [clean, one, fits].map(|rates| [rates[0], rates[1]]);
    assert!(clean > 80.0 && fits > one && mistaken < 15.0, "{text}");
    assert_eq!(num_faces(&path)?, 100);
    Ok(())
}
