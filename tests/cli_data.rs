//! The commands for data sets: `maskinv data`.

use std::fs;

use anyhow::Result;
use maskinv::data::{PairList, VerificationFaces, open_source, read_photo_pairs};

use crate::cli::{TINY, faces, maskinv, refused, stdout, str};

#[test]
fn info_counts_people_and_broken_images() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 5, 3)?;
    fs::remove_file(faces.join("p4/p4_0003.jpg"))?;
    fs::write(faces.join("p1/p1_0002.jpg"), b"no JPEG")?;
    let shown = stdout(&maskinv(&["data", "info", str(&faces), "--decode"])?);
    for line in [
        "faces: folder of identities, 14 images of 5 people\n",
        "images of a person: 2 to 3, median 3, mean 2.8\n",
        "          2        1  ##########\n",
        "     3 to 4        4  ########################################\n",
        "1 of 14 images are broken\n",
        "p1_0002.jpg: expected JPEG, PNG, WebP, BMP or PNM, found an unknown format\n",
    ] {
        assert!(shown.contains(line), "{line} in: {shown}");
    }
    let json: serde_json::Value = serde_json::from_slice(&maskinv(&["data", "info", str(&faces), "--json"])?.stdout)?;
    assert_eq!((&json[0]["num_images"], &json[0]["people_by_images"][1]["people"]), (&14.into(), &1.into()));
    assert!(json[0]["broken"].is_null());
    Ok(())
}

#[test]
fn convert_goes_round_and_takes_lists_along() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 4, 3)?;
    let before = open_source(&faces)?.images;
    let [rec, shards, copy] = ["a/x.rec", "shards", "copy"].map(|name| root.path().join(name));
    #[cfg(feature = "parquet")]
    let parquet = root.path().join("x.parquet");
    let mut from = faces.clone();
    for (to, flags) in [
        (&rec, &[][..]),
        #[cfg(feature = "parquet")]
        (&parquet, &[]),
        (&shards, &["--to", "webdataset", "--shard-size", "5"]),
        (&copy, &["--to", "folder"]),
    ] {
        let output = maskinv(&[&["data", "convert", str(&from), str(to)], flags].concat())?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(stdout(&output).contains("12 images of 4 people"), "{}", stdout(&output));
        let after = open_source(to)?.images;
        for i in 0..12 {
            assert_eq!(after.encoded(i)?, before.encoded(i)?);
        }
        from = to.clone();
    }
    assert_eq!(fs::read_dir(&shards)?.count(), 3);
    let refuse = |args: &[&str]| refused(&[&["data", "convert"], args].concat());
    assert!(refuse(&[str(&faces), str(&rec)])?.ends_with("x.rec: exists already"));
    assert!(refuse(&[str(&faces), str(&shards), "--to", "webdataset"])?.ends_with("shards: exists already"));
    assert!(refuse(&[str(&faces), "new"])?.contains("expected .rec or .parquet, or a folder with --to"));
    assert!(refuse(&[str(&faces), "new.rec", "--to", "parquet"])?.contains("the extension does not match --to"));
    assert!(refuse(&["nowhere", "new.rec"])?.contains("expected a data set, found nothing there"));

    // People by LFW's lists, kept apart and tested on in another format.
    let lfw = root.path().join("lfw");
    fs::create_dir(&lfw)?;
    fs::rename(&faces, lfw.join("images"))?;
    fs::write(lfw.join("people.txt"), "2\n2\np0\t3\np1\t3\n2\np2\t3\np3\t3\n")?;
    fs::write(lfw.join("pairs.txt"), "2\t1\np0\t1\t2\np0\t1\tp1\t2\np2\t1\t3\np2\t2\tp3\t1\n")?;
    let out = root.path().join("packed");
    let output = maskinv(&["data", "convert", str(&lfw), str(&out), "--to", "recordio"])?;
    assert!(output.status.success() && out.join("train.rec").is_file() && out.join("pairs.txt").is_file());
    let run = root.path().join("run");
    let train = ["train", "--data", str(&out), "--out", str(&run), "--arm", "teacher", "--set", "loader.batch_size=4"];
    let folds = ["--set", "data.train_folds=[1]", "--set", "data.test_folds=[2]"];
    let error = refused(&[&train[..], TINY, &folds].concat())?;
    assert!(error.contains("data.test_folds: expected two folds or more"), "{error}");
    Ok(())
}

#[test]
fn pairs_are_drawn_in_three_formats() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 6, 4)?;
    let [txt, csv, bin, across] = ["a.txt", "images.csv", "a.bin", "across.csv"].map(|name| root.path().join(name));
    let draw = |args: &[&str]| -> Result<String> {
        let output = maskinv(&[&["data", "pairs", str(&faces)], args].concat())?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(stdout(&output))
    };
    let shown = draw(&[str(&txt), "--genuine", "20", "--impostor", "30", "--folds", "4"])?;
    assert!(shown.contains("4 folds of 5 pairs of each kind"), "{shown}");
    let images = open_source(&faces)?.images;
    let pairs = PairList::read_lfw(&txt)?.resolve(images.as_ref())?;
    assert_eq!((pairs.len(), pairs.iter().filter(|p| p.is_same).count(), pairs[39].fold), (40, 20, 3));
    assert!(pairs.iter().all(|p| p.is_same == (images.label(p.a) == images.label(p.b))));

    draw(&[str(&bin), "--genuine", "7", "--impostor", "9", "--seed", "3"])?;
    assert_eq!(VerificationFaces::open(&bin)?.is_same().len(), 16);

    // Every second image of a person is masked, say.
    let mut text = "file,masked\n".to_owned();
    for i in 0..images.len() {
        let (name, label) = (images.file_name(i).unwrap_or_default(), images.label(i));
        text += &format!("p{label}/{name},{}\n", i % 2);
    }
    fs::write(&csv, text)?;
    let condition = ["--across", str(&csv), "--column", "masked"];
    draw(&[&[str(&across), "--genuine", "12"][..], &condition].concat())?;
    // The list is read with the images beside it.
    fs::rename(&faces, root.path().join("images"))?;
    let test = read_photo_pairs(&across, 0)?;
    assert_eq!(test.pairs.iter().filter(|p| p.is_same).count(), 12);
    for pair in &test.pairs {
        let number = |index: usize| test.images.name(index).trim_end_matches(".jpg").ends_with(['1', '3']);
        assert!(number(pair.a) && !number(pair.b), "a reference and a probe");
    }
    let images = root.path().join("images");
    let refuse = |args: &[&str]| refused(&[&["data", "pairs", str(&images)], args].concat());
    assert!(refuse(&[str(&txt)])?.ends_with("a.txt: exists already"));
    assert!(refuse(&["new.doc"])?.contains("expected .txt, .csv or .bin"));
    let error = refuse(&["new.csv", "--across", str(&csv), "--column", "age"])?;
    assert!(error.contains("expected a column age, found \"file, masked\""), "{error}");
    Ok(())
}

#[test]
fn check_finds_what_is_wrong_and_is_silent_otherwise() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 4, 3)?;
    let output = maskinv(&["data", "check", str(&faces)])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(stdout(&output), "12 images, 0 broken\n0 copies of other images\n");

    fs::copy(faces.join("p0/p0_0001.jpg"), faces.join("p3/p3_0009.jpg"))?;
    fs::copy(faces.join("p1/p1_0001.jpg"), faces.join("p1/p1_0008.jpg"))?;
    let whole = fs::read(faces.join("p2/p2_0001.jpg"))?;
    fs::write(faces.join("p2/p2_0001.jpg"), &whole[..whole.len() / 2])?;
    let points = root.path().join("points.csv");
    let row = |name: &str, x: f32| {
        format!("{name},{},51.7,{},51.5,{},71.7,{},92.4,{},92.2\n", 38.3 + x, 73.5 + x, 56.0 + x, 41.5 + x, 70.7 + x)
    };
    let head = "file,lex,ley,rex,rey,nx,ny,lmx,lmy,rmx,rmy\n";
    fs::write(
        &points,
        head.to_owned() + &row("p0/p0_0001.jpg", -8.0) + &row("p0/p0_0002.jpg", -8.1) + &row("elsewhere/x.jpg", 0.0),
    )?;
    let output = maskinv(&["data", "check", str(&faces), "--landmarks", str(&points)])?;
    assert_eq!(output.status.code(), Some(1));
    let shown = stdout(&output);
    for part in [
        "14 images, 1 broken\n",
        "p2_0001.jpg: ",
        "2 copies of other images\n",
        "  several people: ",
        "landmarks of 2 images: 8.1 px from the template",
        "warning: 1 images (7.1 %) cannot be used",
        "warning: 1 images appear under several people",
        "warning: 2 images are copies of another",
        "the crops were aligned to the template for 96x112 pixels, 8 px to the left",
    ] {
        assert!(shown.contains(part), "{part} in: {shown}");
    }
    assert!(String::from_utf8_lossy(&output.stderr).contains("4 warnings"));
    let json: serde_json::Value = serde_json::from_slice(&maskinv(&["data", "check", str(&faces), "--json"])?.stdout)?;
    assert_eq!(json["findings"]["duplicates"].as_array().map(Vec::len), Some(2));
    fs::write(&points, "file,x\n")?;
    let error = refused(&["data", "check", str(&faces), "--landmarks", str(&points)])?;
    assert!(error.contains("points.csv:1: expected a column lex"), "{error}");
    Ok(())
}

#[test]
fn a_contact_sheet_is_a_picture_and_an_index_is_rebuilt() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 3, 4)?;
    let sheet = root.path().join("sheet.png");
    let args = ["data", "contact-sheet", str(&faces), str(&sheet), "--rows", "2", "--columns", "3"];
    let shown = stdout(&maskinv(&args)?);
    assert!(shown.starts_with("row 1: p") && shown.lines().count() == 2, "{shown}");
    assert_eq!(image::image_dimensions(&sheet)?, (336, 224));
    assert!(refused(&args)?.ends_with("sheet.png: exists already"));

    let rec = root.path().join("x.rec");
    assert!(maskinv(&["data", "convert", str(&faces), str(&rec)])?.status.success());
    let index = fs::read(rec.with_extension("idx"))?;
    fs::remove_file(rec.with_extension("idx"))?;
    let shown = stdout(&maskinv(&["data", "index", str(&rec)])?);
    assert!(shown.ends_with("x.idx: 16 records\n"), "{shown}");
    assert_eq!(fs::read(rec.with_extension("idx"))?, index);
    assert!(refused(&["data", "index", str(&sheet)])?.contains("expected the start of a record"));
    Ok(())
}

#[test]
fn training_skips_broken_images_only_if_it_may() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (faces, out) = (faces(root.path(), 8, 4)?, root.path().join("out"));
    // Nobody knows who is tested on: every person has one.
    for person in 0..8 {
        fs::write(faces.join(format!("p{person}/p{person}_0009.jpg")), b"\xff\xd8\xff broken")?;
    }
    let bin = root.path().join("test.bin");
    let good = root.path().join("good");
    fs::create_dir(&good)?;
    for person in 0..8 {
        fs::create_dir(good.join(format!("p{person}")))?;
        for i in 1..=4 {
            let name = format!("p{person}/p{person}_{i:04}.jpg");
            fs::copy(faces.join(&name), good.join(&name))?;
        }
    }
    assert!(
        maskinv(&["data", "pairs", str(&good), str(&bin), "--genuine", "20", "--impostor", "20"])?.status.success()
    );
    let pairs = format!("data.pairs={:?}", str(&bin));
    let train = ["train", "--data", str(&faces), "--out", str(&out), "--arm", "teacher", "--set", &pairs];
    let train = [&train[..], TINY].concat();
    assert!(refused(&train)?.contains("_0009.jpg: "));
    let output = maskinv(&[&train[..], &["--set", "data.on_broken=skip", "--overwrite"]].concat())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains("broken images: "), "{said}");
    assert!(said.contains("faces: folder of identities, 40 images of 8 people"), "{said}");
    Ok(())
}
