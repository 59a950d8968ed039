//! Photos with real masks: the list of pairs, what is refused, and the figures in training and evaluation.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use maskinv::data::read_photo_pairs;

use crate::cli::{TINY, faces, maskinv, refused, stdout, str};

/// Writes a list beside the pictures of [`faces`] and returns its path.
fn list(root: &Path, rows: &str) -> Result<PathBuf> {
    let path = root.join("pairs.csv");
    std::fs::write(&path, rows)?;
    Ok(path)
}

/// Twelve pairs of each kind among the people of `faces(root, 6, 4)`.
fn rows() -> String {
    let mut rows = "masked,unmasked,same\n".to_owned();
    for (p, q) in (0..6).map(|p| (p, (p + 1) % 6)) {
        for (a, b) in [(1, 2), (3, 4)] {
            rows += &format!("p{p}/p{p}_000{a}.jpg, p{p}/p{p}_000{b}.jpg, 1\n");
            rows += &format!("p{p}/p{p}_000{a}.jpg,p{q}/p{q}_000{b}.jpg,false\n");
        }
    }
    rows
}

#[test]
fn pairs_name_photos_once_and_come_in_the_order_of_the_seed() -> Result<()> {
    let root = tempfile::tempdir()?;
    std::fs::rename(faces(root.path(), 6, 4)?, root.path().join("images"))?;
    let path = list(root.path(), &rows())?;
    let test = read_photo_pairs(&path, 0)?;
    assert_eq!((test.images.len(), test.pairs.len(), test.num_folds), (24, 24, 10));
    assert_eq!(test.pairs.iter().filter(|p| p.is_same).count(), 12);
    let person =
        |i: usize| Ok::<_, anyhow::Error>(test.images.name(i).rsplit('/').nth(1).context("a folder")?.to_owned());
    for pair in &test.pairs {
        assert_eq!(person(pair.a)? == person(pair.b)?, pair.is_same);
        test.images.get(pair.a)?;
    }
    assert_eq!(test.pairs, read_photo_pairs(&path, 0)?.pairs);
    assert_ne!(test.pairs, read_photo_pairs(&path, 1)?.pairs);
    Ok(())
}

#[test]
fn lists_that_say_something_else_are_refused_with_the_line() -> Result<()> {
    let root = tempfile::tempdir()?;
    std::fs::rename(faces(root.path(), 2, 2)?, root.path().join("images"))?;
    let refused = |rows: &str| -> Result<String> {
        let path = list(root.path(), rows)?;
        Ok(read_photo_pairs(&path, 0).err().with_context(|| format!("{rows:?} was taken"))?.to_string())
    };
    let good = "a,b,same\np0/p0_0001.jpg,p0/p0_0002.jpg,1\n";
    for (rows, expected) in [
        ("", "pairs.csv:1: expected \"folds pairs\", found the end of the file"),
        ("a,b\nx,y\n", "pairs.csv:1: expected LFW's or MFR2's pairs"),
        (&format!("{good}p0/p0_0001.jpg,p9/p9_0001.jpg,0\n"), "pairs.csv:3: expected an image"),
        (&format!("{good}p0/p0_0001.jpg,p1/p1_0001.jpg,maybe\n"), "pairs.csv:3: expected 1 or 0 for whether"),
        (&format!("{good}p0/p0_0001.jpg,1\n"), "pairs.csv:3: "),
        (&format!("{good}p0/p0_0002.jpg,p0/p0_0001.jpg,0\n"), "pairs.csv:3: expected what line 2 says of this pair"),
        (&format!("{good}p0/p0_0002.jpg,p0/p0_0002.jpg,0\n"), "pairs.csv:3: expected different people"),
        ("p0 1 2\n", "pairs.csv:1: expected two image files"),
        ("a,b,same\n", "pairs.csv:1: expected pairs after the column names"),
        (good, "expected genuine and impostor pairs"),
    ] {
        let error = refused(rows)?;
        assert!(error.contains(expected), "{rows:?}: {error}");
    }
    let missing = read_photo_pairs(&root.path().join("no.csv"), 0).err().context("was taken")?.to_string();
    assert!(missing.contains("no.csv: No such file"), "{missing}");
    Ok(())
}

#[test]
fn training_and_evaluation_agree_on_photos_with_masks() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (faces, out) = (faces(root.path(), 6, 4)?, root.path().join("out"));
    // No folder `images`: the files are beside the list.
    let photos = list(&faces, &rows())?;
    let flags = ["--arm", "aug", "--real-masks", str(&photos)];
    let output = maskinv(&[&["train", "--data", str(&faces), "--out", str(&out)][..], TINY, &flags].concat())?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(stdout(&output).contains("real masks"), "{}", stdout(&output));
    let results: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("results.json"))?)?;
    let trained = &results["arms"]["aug"]["real_masks"];
    assert_eq!((&trained["num_genuine"], &trained["num_impostor"]), (&12.into(), &12.into()));

    let model = out.join("aug");
    let evaluate = ["evaluate", str(&model), "--real-masks", str(&photos), "--json"];
    let output = maskinv(&evaluate)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let evaluated: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(&evaluated["real_masks"][str(&model)], trained);
    let error = refused(&["evaluate", str(&model), "--real-masks", "nowhere.csv"])?;
    assert!(error.contains("nowhere.csv: No such file"), "{error}");
    Ok(())
}
