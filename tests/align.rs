//! `maskinv align` and the alignment of crops, with the detector of `photo_kit`.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use image::{Rgb, RgbImage, imageops};
use maskinv::data::read_image;
use maskinv::face::{DetectConfig, Detector, Face};

use crate::cli::{example, maskinv, stdout, str};
use crate::photo_kit::{CELL, Kit, LEFT, RIGHT, face, photo, photo_set};

#[test]
fn the_detector_of_the_test_finds_the_squares_and_their_crops() -> Result<()> {
    let kit = Kit::new()?;
    let (a, b) = (face(0, 0)?, face(1, 0)?);
    let path = kit.save("two.png", &photo(&[(&a, LEFT), (&b, RIGHT)]))?;
    let photo = read_image(&path)?;
    let faces = Detector::open(&kit.path("detector.onnx"))?.detect(&photo, &DetectConfig::default())?;
    let lefts: Vec<f32> = faces.iter().map(|face: &Face| face.bounds[0].round()).collect();
    assert_eq!(lefts, [30.0, 190.0], "{faces:?}");
    // Smaller faces are looked for in tiles: the same are found.
    let config = DetectConfig { min_face: Some(10.0), ..DetectConfig::default() };
    assert_eq!(Detector::open(&kit.path("detector.onnx"))?.detect(&photo, &config)?, faces);
    let out = kit.path("out");
    let (code, printed, said) = kit.run(&["align", str(&path), str(&out), "--face", "all", "--format", "png"])?;
    assert_eq!((code, printed.contains("2 crops")), (Some(0), true), "{printed}{said}");
    let crops = [1, 2].map(|i| read_image(&out.join(format!("images/two_{i}.png"))));
    let [first, second] = crops;
    assert!(first? == a && second? == b, "the crops are the faces as they were pasted");
    Ok(())
}

#[test]
fn hostile_photos_are_left_out_and_the_rest_is_aligned() -> Result<()> {
    let kit = Kit::new()?;
    let face = face(0, 0)?;
    let good = kit.save("in/good.png", &photo(&[(&face, LEFT)]))?;
    let bytes = std::fs::read(&good)?;
    std::fs::write(kit.path("in/empty.jpg"), b"")?;
    std::fs::write(kit.path("in/cut.png"), &bytes[..bytes.len() / 2])?;
    std::fs::copy(&good, kit.path("in/named_wrong.jpg"))?;
    std::fs::write(kit.path("in/phone.jpg"), b"\0\0\0\x18ftypheic\0\0\0\0heicmif1")?;
    std::fs::write(kit.path("in/other.heic"), b"\0\0\0\x18ftypheic\0\0\0\0heicmif1")?;
    kit.save("in/dot.png", &RgbImage::new(1, 1))?;
    kit.save("in/line.png", &RgbImage::new(50_000, 1))?;
    // Twenty by fifteen squares, 300 faces.
    let mut many = RgbImage::from_pixel(2 * 20 * CELL, 2 * 15 * CELL, Rgb([90; 3]));
    let square = RgbImage::from_pixel(CELL, CELL, Rgb([255; 3]));
    for (x, y) in (0..20).flat_map(|x| (0..15).map(move |y| (x, y))) {
        imageops::replace(&mut many, &square, i64::from(2 * x * CELL), i64::from(2 * y * CELL));
    }
    kit.save("in/many.png", &many)?;
    #[cfg(unix)]
    std::os::unix::fs::symlink(kit.path("in"), kit.path("in/loop"))?;
    let out = kit.path("out");
    // Faces of 16 pixels are looked for at the photo's own size, in tiles.
    let input = kit.path("in");
    let args = ["align", str(&input), str(&out), "--face", "all", "--min-face", "16", "--json"];
    let (code, printed, said) = kit.run(&args)?;
    assert_eq!(code, Some(0), "{said}");
    let found: serde_json::Value = serde_json::from_str(&printed)?;
    assert_eq!((&found["photos"], &found["left_out"]), (&8.into(), &5.into()), "{found}");
    assert!(said.contains("1 images in formats that are not read") && said.contains("other.heic"), "{said}");
    let left_out = std::fs::read_to_string(out.join("left_out.csv"))?;
    for text in [
        "empty.jpg,0,",
        "cut.png,0,",
        "phone.jpg,0,\"expected JPEG, PNG, WebP, BMP or PNM, found HEIC",
        "dot.png,0,no face",
        "line.png,0,no face",
    ] {
        assert!(left_out.contains(text), "expected {text}: {left_out}");
    }
    let faces = std::fs::read_to_string(out.join("faces.csv"))?;
    let of = |name: &str| faces.lines().filter(|line| line.starts_with(name)).count();
    assert_eq!((of("good_"), of("named_wrong_")), (1, 1), "{faces}");
    // Boxes of 100 pixels, 64 apart: neighbours overlap by less than 0.3.
    assert_eq!(of("many_"), 300, "{said}");
    Ok(())
}

#[test]
fn crops_have_the_size_and_the_format_that_is_asked_for() -> Result<()> {
    let kit = Kit::new()?;
    let set = photo_set(&kit, 3)?;
    let out = kit.path("large");
    let (code, _, said) = kit.run(&["align", str(&set), str(&out), "--size", "160"])?;
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(read_image(&out.join("images/p1/p1_0.jpg"))?.dimensions(), (160, 160));
    let rec = kit.path("set.rec");
    let (code, printed, said) = kit.run(&["align", str(&set), str(&rec)])?;
    assert_eq!(code, Some(0), "{printed}{said}");
    let info = stdout(&maskinv(&["data", "info", str(&rec)])?);
    assert!(info.contains("6") && info.contains("RecordIO"), "{info}");
    assert!(kit.path("set.faces.csv").is_file() && kit.path("set.left_out.csv").is_file());
    let shards = kit.path("shards");
    let (code, _, said) = kit.run(&["align", str(&set), str(&shards), "--to", "webdataset"])?;
    assert!(code == Some(0) && shards.join("faces-000000.tar").is_file(), "{said}");
    for (args, text) in [
        (&[str(&set), str(&out)][..], "exists already"),
        (&[str(&set), str(&set.join("inside"))], "expected a place outside of"),
        (&[str(&set), str(&kit.path("x.rec")), "--to", "folder"], "does not match --to"),
        (&[str(&set), str(&kit.path("x.parquet"))], "expected a new folder or NAME.rec"),
        (&[str(&kit.path("nothing")), str(&kit.path("x"))], "nothing"),
    ] {
        let (code, _, said) = kit.run(&[&["align"][..], args].concat())?;
        assert!(code == Some(1) && said.contains(text), "{text}: {said}");
    }
    // A folder has one set of records, which is said before any photo is searched.
    std::fs::create_dir(kit.path("other"))?;
    std::fs::write(kit.path("other/property"), "1,112,112")?;
    let (code, _, said) = kit.run(&["align", str(&set), str(&kit.path("other/x.rec"))])?;
    assert!(code == Some(1) && said.contains("property: exists already, of another set"), "{said}");
    assert_eq!(std::fs::read_dir(kit.path("other"))?.count(), 1);
    // Nothing is left of a set without faces.
    kit.save("none/a.png", &photo(&[]))?;
    let (code, _, said) = kit.run(&["align", str(&kit.path("none")), str(&kit.path("x"))])?;
    assert!(code == Some(3) && said.contains("none of 1 photos has a crop"), "{said}");
    assert!(!kit.path("x").exists());
    kit.save("twice/a.png", &photo(&[]))?;
    kit.save("twice/a.jpg", &photo(&[]))?;
    let (code, _, said) = kit.run(&["align", str(&kit.path("twice")), str(&kit.path("x"))])?;
    assert!(code == Some(1) && said.contains("would both be written to a.jpg"), "{said}");
    Ok(())
}

#[test]
fn an_interrupted_alignment_goes_on_where_it_stopped() -> Result<()> {
    let kit = Kit::new()?;
    let one = photo(&[(&face(0, 0)?, LEFT)]);
    for number in 0..400 {
        kit.save(&format!("in/{number:03}.png"), &one)?;
    }
    let (input, out, detector) = (kit.path("in"), kit.path("out"), kit.path("detector.onnx"));
    let args = ["align", str(&input), str(&out), "--detector", str(&detector), "--threads", "1"];
    let mut child =
        Command::new(env!("CARGO_BIN_EXE_maskinv")).args(args).stderr(std::process::Stdio::piped()).spawn()?;
    let journal = kit.path(".maskinv-unfinished-out").join(".maskinv-journal");
    let began = Instant::now();
    while !std::fs::metadata(&journal).is_ok_and(|data| data.len() > 0) {
        anyhow::ensure!(child.try_wait()?.is_none(), "it ended before it could be interrupted");
        anyhow::ensure!(began.elapsed() < Duration::from_secs(60), "no journal");
        std::thread::sleep(Duration::from_millis(2));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status()?;
    let stopped = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&stopped.stderr);
    assert!(stopped.status.code() == Some(75) && said.contains("the same command goes on"), "{said}");
    // A line that a crash cut is done again.
    let text = std::fs::read_to_string(&journal)?;
    std::fs::write(&journal, &text[..text.len() - 5])?;
    let output = maskinv(&args)?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("going on after") && said.contains("of 400 photos"), "{said}");
    assert_eq!(std::fs::read_to_string(out.join("faces.csv"))?.lines().count(), 401);
    assert_eq!(std::fs::read_dir(out.join("images"))?.count(), 400);
    assert!(!out.join(".maskinv-journal").exists());
    Ok(())
}

#[test]
fn misaligned_crops_of_a_data_set_are_found_by_a_detector() -> Result<()> {
    let kit = Kit::new()?;
    // A crop is searched at 112 pixels, where the grid has the square in the third row and column, and at 320.
    let in_place = |x: i64, y: i64, name: &str| -> Result<()> {
        let mut crop = RgbImage::from_pixel(112, 112, Rgb([90; 3]));
        imageops::replace(&mut crop, &RgbImage::from_pixel(CELL, CELL, Rgb([255; 3])), x, y);
        kit.save(&format!("set/p/{name}.png"), &crop).map(drop)
    };
    in_place(64, 64, "a")?;
    in_place(32, 32, "b")?;
    kit.save("set/q/c.png", &RgbImage::from_pixel(112, 112, Rgb([90; 3])))?;
    let (code, printed, said) = kit.run(&["data", "check", str(&kit.path("set"))])?;
    assert_eq!(code, Some(1), "{said}");
    // The square's corner is at 40 in an aligned crop: 32 is 8 away in both directions. Of the other crop's faces at
    // both sizes, the one at 320 is nearer to the middle.
    for text in ["landmarks of 2 images: ", "p/a.png: 22.0 px away", "p/b.png: 11.3 px away", "q/c.png: no face"] {
        assert!(printed.contains(text), "expected {text}: {printed}");
    }
    assert!(printed.contains("warning: 1 images (33.3 %) have no face that the detector finds"), "{printed}");
    Ok(())
}

#[test]
fn the_example_prints_and_aligns_the_faces_of_photos() -> Result<()> {
    let kit = Kit::new()?;
    let face = face(0, 0)?;
    let input = kit.save("two.png", &photo(&[(&face, LEFT), (&face, RIGHT)]))?;
    let out = kit.path("out");
    let printed = stdout(&example("align", &[str(&kit.path("detector.onnx")), str(&out), "--once", str(&input)])?);
    let numbers: Vec<usize> = printed.lines().map(|line| line.split('\t').count()).collect();
    assert_eq!(numbers, [16, 16], "a photo, a score, four edges and five points: {printed}");
    assert!(read_image(&out.join("two-1.png"))? == face);
    Ok(())
}
