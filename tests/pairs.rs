//! Pair and people lists, good and bad, and drawn pairs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use maskinv::data::{Dataset, FaceFolder, IdentityFilter, ImageId, Pair, PairList, People, Subset, sample_pairs};
use maskinv::{Error, Result};
use tempfile::TempDir;

const LFW: &str = "2\t1\nAnn\t1\t2\nAnn\t1\tBob\t1\nBob\t2\t1\nBob\t2\tCy\t1\n";

fn list(text: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("list.txt");
    std::fs::write(&path, text).expect("can write");
    (dir, path)
}

/// A folder of empty files; pairs are resolved without opening an image.
fn faces(names: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for name in names {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().expect("inside a folder")).expect("can create folders");
        std::fs::write(path, b"").expect("can write");
    }
    dir
}

/// What must be said about a bad list, with the line it is said of.
fn assert_refused<T: std::fmt::Debug>(
    read: impl Fn(&Path) -> Result<T>,
    text: impl AsRef<[u8]>,
    expected_line: usize,
    expected_words: &str,
) {
    let (_dir, path) = list(&text);
    let shown = String::from_utf8_lossy(text.as_ref()).into_owned();
    match read(&path) {
        Err(Error::Line { path: found, line, what }) => {
            assert_eq!((found, line), (path, expected_line), "{shown:?}: {what}");
            assert!(what.contains(expected_words), "{shown:?}: expected {expected_words:?}, found {what:?}");
        }
        other => panic!("{shown:?}: expected a line error, found {other:?}"),
    }
}

/// The name and the number of an image.
fn numbered(id: &ImageId) -> (&str, u32) {
    match id {
        ImageId::Numbered { identity, number } => (identity, *number),
        ImageId::File(path) => panic!("a numbered image, not {path}"),
    }
}

#[test]
fn lfw_pairs_are_read() -> Result<()> {
    let expected = [
        ("Ann", 1, "Ann", 2, true, 0),
        ("Ann", 1, "Bob", 1, false, 0),
        ("Bob", 2, "Bob", 1, true, 1),
        ("Bob", 2, "Cy", 1, false, 1),
    ];
    for text in [LFW.to_owned(), LFW.replace('\n', "\r\n"), format!("\u{feff}{LFW}\n\n"), LFW.replace('\t', "  ")] {
        let (_dir, path) = list(&text);
        for pairs in [PairList::read(&path)?, PairList::read_lfw(&path)?] {
            assert_eq!(pairs.num_folds(), 2);
            let found = pairs.entries().iter().map(|e| {
                let ((a, i), (b, j)) = (numbered(&e.a), numbered(&e.b));
                (a, i, b, j, e.is_same, e.fold)
            });
            assert_eq!(found.collect::<Vec<_>>(), expected, "{text:?}");
            assert_eq!(pairs.entries()[3].line, 5);
        }
    }
    let (_dir, path) = list("1\nAnn 1 2\nAnn 1 Bob 1");
    assert_eq!(PairList::read(&path)?.num_folds(), 1);
    Ok(())
}

#[test]
fn mfr2_pairs_are_read_in_any_order() -> Result<()> {
    let (_dir, path) = list("Ann 1 Bob 1\nAnn 1 2\n\n007 3 4\n");
    let pairs = PairList::read(&path)?;
    assert_eq!(pairs.num_folds(), 1);
    let number = |id| numbered(id).1;
    let found: Vec<_> =
        pairs.entries().iter().map(|e| (number(&e.a), number(&e.b), e.is_same, e.fold, e.line)).collect();
    assert_eq!(found, [(1, 1, false, 0, 1), (1, 2, true, 0, 2), (3, 4, true, 0, 4)]);
    Ok(())
}

/// Two people with two images each; pairs 1 and 2 of the first are genuine, 1 of each is an impostor pair.
const PEOPLE: [&str; 4] =
    ["Ann Lee/Ann Lee_0001.jpg", "Ann Lee/Ann Lee_0002.jpg", "Bob/Bob_0001.jpg", "Bob/Bob_0002.jpg"];

#[test]
fn every_form_of_a_list_names_the_same_pairs() -> Result<()> {
    let dir = faces(&PEOPLE);
    let images = FaceFolder::open(dir.path())?;
    let pair = |a, b, is_same| Pair { a, b, is_same, fold: 0 };
    let expected = [pair(0, 1, true), pair(0, 2, false), pair(2, 3, true)];
    let [a1, a2, b1, b2] = PEOPLE;
    for text in [
        // Names and numbers: MFR2's with tabs, commas, Kaggle's two, from 0.
        "Ann Lee\t1\t2\nAnn Lee\t1\tBob\t1\nBob\t1\t2\n".to_owned(),
        "# by hand\nAnn Lee,1,2\nAnn Lee,1,Bob,1\nBob,1,Bob,2\n".to_owned(),
        "1,1\nAnn Lee,1,2\nAnn Lee,1,Bob,1\n".to_owned(),
        "name,imagenum1,imagenum2,\nAnn Lee,1,2,\nAnn Lee,1,Bob,1\nBob,1,2,\n".to_owned(),
        "name1,imagenum1,name2,imagenum2,label\nAnn Lee,1,Ann Lee,2,1\nAnn Lee,1,Bob,1,0\nBob,1,Bob,2,1\n".to_owned(),
        "Ann Lee\t0\t1\nAnn Lee\t0\tBob\t0\nBob\t0\t1\n".to_owned(),
        // Files: with blanks in names, the flag first or last, with column names in any order.
        format!("{a1} {a2} 1\n{a1} {b1} 0\n{b1} {b2} 1\n"),
        format!("1 {a1} {a2}\n-1 {a1} {b1}\n1 {b1} {b2}\n"),
        format!("{a1}\t{a2}\tTrue\n{a1}\t{b1}\tFalse\n{b1}\t{b2}\tTrue\n"),
        format!("a,b,same\r\n{a1},{a2},1\r\n{a1},{b1},0\r\n{b1},{b2},1\r\n"),
        format!("\u{feff},issame,image1,image2\n0,same,\"{a1}\",\"{a2}\"\n1,different,{a1},{b1}\n2,same,{b1},{b2}\n"),
        format!("path1;path2;label;note\n/x/{a1};/x/{a2};1.0;\n{a1};{b1};0.0;\nBob_0001.jpg;Bob_0002.jpg;1.0;\n"),
        "all/Ann Lee_0001.jpg,all/Ann Lee_0002.jpg,1\nx\\Ann Lee_0001.jpg,x\\Bob_0001.jpg,0\n".to_owned(),
        // Folds numbered from any number, one after the other or not.
        format!("a,b,same,fold\n{a1},{a2},1,7\n{a1},{b1},0,7\n{b1},{b2},1,7\n"),
    ] {
        let (_list_dir, path) = list(&text);
        let list = PairList::read(&path)?;
        let pairs = list.resolve(&images)?;
        assert_eq!(pairs, expected[..pairs.len()], "{text:?}");
        assert!(pairs.len() > 1, "{text:?}");
        assert_eq!(list.counts_from_zero(&images), text.contains("\t0"), "{text:?}");
    }
    Ok(())
}

#[test]
fn paths_tell_files_apart_that_have_person_and_name_in_common() -> Result<()> {
    let dir = faces(&["clean/ann/1.jpg", "clean/ann/2.jpg", "clean/bob/1.jpg", "masked/ann/1.jpg", "masked/bob/1.jpg"]);
    let listed = dir.path().join("all.csv");
    let rows = ["clean/ann/1", "clean/ann/2", "clean/bob/1", "masked/ann/1", "masked/bob/1"];
    let row = |path: &str| format!("{path}.jpg,{}\n", if path.contains("ann") { "ann" } else { "bob" });
    std::fs::write(&listed, format!("path,person\n{}", rows.map(row).concat())).expect("can write");
    let images = maskinv::data::open_source(&listed)?.images;
    let resolve = |text: &str| -> Result<Vec<[usize; 2]>> {
        let (_list_dir, path) = list(text);
        Ok(PairList::read(&path)?.resolve(images.as_ref())?.iter().map(|pair| [pair.a, pair.b]).collect())
    };
    assert_eq!(resolve("clean/ann/1.jpg,masked/ann/1.jpg,1\nclean/ann/2.jpg,masked/bob/1.jpg,0\n")?, [[0, 3], [1, 4]]);
    assert_eq!(resolve("ann/2.jpg,masked/ann/1.jpg,1\n")?, [[1, 3]]);
    let ambiguous = resolve("ann/1.jpg,masked/ann/1.jpg,1\n").unwrap_err().to_string();
    assert!(ambiguous.contains("expected one image ann/1.jpg in the data set, found several"), "{ambiguous}");
    Ok(())
}

#[test]
fn folds_are_put_one_after_the_other() -> Result<()> {
    let row = |i: usize, fold: usize| format!("a/{i}.jpg,b/{i}.jpg,0,{fold}\n");
    let largest = usize::MAX;
    let rows: String = [(0, 9), (1, 3), (2, 9), (3, largest), (4, 3)].map(|(i, fold)| row(i, fold)).concat();
    let (_dir, path) = list(format!("a,b,same,fold\n{rows}"));
    let pairs = PairList::read(&path)?;
    assert_eq!(pairs.num_folds(), 3);
    let found: Vec<(usize, usize)> = pairs.entries().iter().map(|entry| (entry.line, entry.fold)).collect();
    assert_eq!(found, [(3, 0), (6, 0), (2, 1), (4, 1), (5, 2)]);
    Ok(())
}

#[test]
fn images_of_lists_are_known_by_any_usual_name() -> Result<()> {
    for names in [
        ["Ann/Ann_0001.jpg", "Ann/Ann_0002.jpg"],
        ["Ann/Ann_1.jpg", "Ann/Ann_2.jpg"],
        ["Ann/1.jpg", "Ann/02.jpg"],
        ["Ann/Ann_0001_0.jpg", "Ann/Ann_0002_1.png"],
    ] {
        let dir = faces(&names);
        let (_list_dir, path) = list("Ann 1 2\n");
        let pairs = PairList::read(&path)?.resolve(&FaceFolder::open(dir.path())?)?;
        let folder = FaceFolder::open(dir.path())?;
        let found = [pairs[0].a, pairs[0].b].map(|index| folder.person_and_file(index).expect("it has a name"));
        assert_eq!(found, names);
    }
    Ok(())
}

#[test]
fn pairs_that_contradict_each_other_or_are_ambiguous_are_refused() -> Result<()> {
    let dir = faces(&[PEOPLE[0], PEOPLE[1], "Bob/Bob_0001.jpg", "Bob/Bob_0001.png"]);
    let images = FaceFolder::open(dir.path())?;
    let [a1, a2, b1, _] = PEOPLE;
    for (text, line, words) in [
        (format!("{a1},{a2},1\n{a2},{a1},0\n"), 2, "as in line 1, found different people"),
        (format!("{a1},{a2},1\n{b1},{b1},0\n"), 2, "which are one image"),
        ("Bob 1 1\n".to_owned(), 1, "expected one image 1 of Bob in the data set, found "),
        (format!("{a1},{a2},1\nx/nobody.jpg,{b1},0\n"), 2, "expected an image x/nobody.jpg in the data set"),
        (format!("{a1},{a2},1\nzoe/Ann Lee_0001.jpg,{b1},0\n"), 2, "expected an image zoe/Ann Lee_0001.jpg in the"),
        (format!("{a1},{a2},0\n"), 1, "expected images of two people, found "),
        // Two lists' worth of files, of which the data set has one.
        (format!("clean/{a1},masked/{a2},1\n"), 1, "expected an image clean/Ann Lee/Ann Lee_0001.jpg in the data set"),
        (format!("{a1},{b1},1\n"), 1, "of two people in the data set"),
    ] {
        assert_refused(|path| PairList::read(path)?.resolve(&images), text, line, words);
    }
    // A pair that is there twice is counted twice, as published lists have some.
    let (_list_dir, path) = list(format!("{a1},{a2},1\n{a2},{a1},1\n"));
    assert_eq!(PairList::read(&path)?.resolve(&images)?.len(), 2);
    Ok(())
}

#[test]
fn lists_of_another_form_are_refused_with_the_forms_that_are_known() {
    let read = |p: &Path| PairList::read(p);
    assert_refused(read, "what is this\n", 1, "expected LFW's or MFR2's pairs");
    assert_refused(read, "a/1.jpg 0\nb/1.jpg 1\n", 1, "expected LFW's or MFR2's pairs");
    assert_refused(read, "a/1.jpg,b/1.jpg\n", 1, "found two files alone");
    assert_refused(read, "image1,image2\na/1.jpg,b/1.jpg\n", 1, "columns such as image1,image2,same");
    assert_refused(read, "a,b,same\na/1.jpg,b/1.jpg,1\na/1.jpg,b/1.jpg,2\n", 3, "expected 1 or 0");
    assert_refused(read, "a,b,same\na/1.jpg,b/1.jpg,1\na/1.jpg,b/1,1.jpg,1\n", 3, "expected 3 fields, found 4");
    let folds =
        |last: &str| format!("a,b,same,fold\na/1.jpg,b/1.jpg,0,2\na/1.jpg,c/1.jpg,0,1\na/2.jpg,b/2.jpg,0,{last}\n");
    assert_refused(read, folds("3") + "a/2.jpg,c/2.jpg,0,3\n", 1, "expected 2 pairs in fold 1 of 3, found 1");
    assert_refused(read, folds("-1"), 4, "expected the number of a fold");
    assert_refused(read, "a/1.jpg b/1.jpg 1\na/1.jpg 1\n", 2, "expected two image files and 1 or 0");
    assert_refused(read, "Ann 1 2\nJane Doe 1 2\n", 2, "whole numbers of images");
    assert_refused(read, "name1,imagenum1,name2,imagenum2,label\nAnn,1,Bob,2,1\n", 2, "agrees with the names");
}

#[test]
fn bad_lfw_pairs_are_refused_by_line() {
    let read = |p: &Path| PairList::read(p);
    assert_refused(read, "", 1, "end of the file");
    assert_refused(read, "\n\n", 3, "end of the file");
    assert_refused(read, "2 x\n", 1, "whole number from 1 for \"x\"");
    assert_refused(read, "0 1\n", 1, "whole number from 1");
    assert_refused(read, "1 -1\n", 1, "whole number from 1");
    assert_refused(read, "99999999999999999999 1\n", 1, "whole number from 1");
    assert_refused(|p| PairList::read_lfw(p), "1 1 1\n", 1, "numbers of folds and of pairs");
    assert_refused(read, "1 1\nAnn 1\n", 2, "pair 1 of 1 of fold 0, same \"name i j\", found \"Ann 1\"");
    assert_refused(read, "1 1\nAnn 1 2 Bob 1\n", 2, "found \"Ann 1 2 Bob 1\"");
    assert_refused(read, "1 1\nAnn 1 two\nAnn 1 Bob 1\n", 2, "found \"Ann 1 two\"");
    assert_refused(read, "1 1\nAnn -1 2\nAnn 1 Bob 1\n", 2, "found \"Ann -1 2\"");
    assert_refused(read, "1 1\nAnn 1 Bob 1\nAnn 1 2\n", 2, "same");
    assert_refused(read, "1 2\nAnn 1 2\nAnn 1 3\nAnn 2 3\n", 4, "different");
    assert_refused(read, "1 1\nAnn 1 2\nAnn 1 Ann 2\n", 3, "different \"name1 i name2 j\"");
    assert_refused(read, "2 1\nAnn 1 2\nAnn 1 Bob 1\n", 4, "fold 1, same \"name i j\", found the end of the file");
    assert_refused(read, format!("{LFW}Bob 1 2\n"), 6, "expected the end of the file");
    // Forged counts end at the first missing line and reserve nothing.
    assert_refused(read, "1000000000000000000 1000000000000000000\nAnn 1 2\n", 3, "end of the file");
}

#[test]
fn bad_mfr2_pairs_are_refused_by_line() {
    let read = |p: &Path| PairList::read(p);
    assert_refused(read, "", 1, "end of the file");
    assert_refused(read, "Ann 1 2\nAnn 1\n", 2, "expected \"name i j\"");
    assert_refused(read, "Ann 1 2\nAnn 1 b\n", 2, "whole numbers of images");
    let (_dir, path) = list(b"Ann 1 2\nJos\xe9 1 2\n");
    let error = PairList::read(&path).expect_err("must be refused");
    assert!(matches!(error, Error::Format { offset: 11, .. }), "{error:?}");
    let missing = path.with_file_name("missing.txt");
    assert!(matches!(PairList::read(&missing), Err(Error::Io { path, .. }) if path == missing));
}

#[test]
fn pairs_resolve_to_images() -> Result<()> {
    let dir = faces(&["Ann/Ann_0001.jpg", "Ann/Ann_0002.jpg", "Bob/Bob_1.png", "Bob/Bob_0002.png", "Cy/Cy_0001.jpg"]);
    let (_list_dir, path) = list(LFW);
    let pairs = PairList::read(&path)?;
    let pair = |a, b, is_same, fold| Pair { a, b, is_same, fold };
    let expected = [pair(0, 1, true, 0), pair(0, 3, false, 0), pair(2, 3, true, 1), pair(2, 4, false, 1)];
    assert_eq!(pairs.resolve(&FaceFolder::open(dir.path())?)?, expected);

    let filter = IdentityFilter { min_images: 2, names: None };
    let without_cy = Subset::new(Arc::new(FaceFolder::open(dir.path())?), &filter, dir.path())?;
    let text = pairs.resolve(&without_cy).expect_err("must be refused").to_string();
    let expected = format!("{}:5: expected image 1 of Cy in the data set", path.display());
    assert!(text.starts_with(&expected) && text.ends_with("found none"), "{text}");
    Ok(())
}

#[test]
fn people_are_read() -> Result<()> {
    let folds = "\u{feff}2\r\n1\r\nAnn\t3\r\n2\r\nBob\t1\r\nCy\t12\r\n\r\n";
    let (_dir, path) = list(folds);
    let people = People::read(&path)?;
    assert_eq!(people.folds.iter().map(Vec::len).collect::<Vec<_>>(), [1, 2]);
    assert_eq!((people.folds[1][1].name.as_str(), people.folds[1][1].num_images), ("Cy", 12));
    assert_eq!(people.names([1, 0]), ["Bob", "Cy", "Ann"]);
    assert!(people.names(2..9).is_empty());

    let (_dir, path) = list("2\nAnn 3\nBob 1\n");
    assert_eq!(People::read(&path)?.names([0]), ["Ann", "Bob"]);
    Ok(())
}

#[test]
fn bad_people_are_refused_by_line() {
    let read = |p: &Path| People::read(p);
    assert_refused(read, "", 1, "number of folds or of people, found the end of the file");
    assert_refused(read, "Ann 3\n", 1, "number of folds or of people");
    assert_refused(read, "many\n", 1, "whole number from 1 for \"many\"");
    assert_refused(read, "2\n1\nAnn 3\n", 4, "number of people of fold 1, found the end of the file");
    assert_refused(read, "2\n1\nAnn 3\nBob 2\n", 4, "number of people of fold 1, found \"Bob 2\"");
    assert_refused(read, "1\n2\nAnn 3\nBob 0\n", 4, "whole number from 1 for \"0\"");
    assert_refused(read, "1\n2\nAnn 3\n2\n", 4, "person 2 of 2 of fold 0");
    assert_refused(read, "1\n1\nAnn Lee 3\n", 3, "person 1 of 1");
    assert_refused(read, "1\n1\nAnn 3\nBob 1\n", 4, "expected the end of the file");
    assert_refused(read, "2\n1\nAnn 3\n1\nAnn 3\n", 5, "Ann is in line 3 too");
    assert_refused(read, "1\n18446744073709551615\nAnn 3\n", 4, "end of the file");
}

#[test]
fn all_pairs_are_drawn_once() {
    let labels = [7, 3, 7, 0, 7, 3, 9, 7, 0, 0, 0, 0];
    let pairs = sample_pairs(&labels, usize::MAX, usize::MAX, 1);
    assert_eq!(pairs.len(), labels.len() * (labels.len() - 1) / 2);
    assert!(pairs.iter().all(|p| p.a < p.b && p.is_same == (labels[p.a] == labels[p.b]) && p.fold == 0));
    let mut indices: Vec<_> = pairs.iter().map(|p| (p.a, p.b)).collect();
    indices.sort_unstable();
    indices.dedup();
    assert_eq!(indices.len(), pairs.len());
    // Both kinds from the start, so that folds cut from the list have both.
    assert!(pairs[..20].iter().any(|p| p.is_same) && pairs[..20].iter().any(|p| !p.is_same));
}

#[test]
fn drawn_pairs_follow_the_seed() {
    let labels: Vec<u32> = (0..3000).map(|i| i * 7919 % 500).collect();
    let pairs = sample_pairs(&labels, 200, 300, 5);
    assert_eq!(pairs, sample_pairs(&labels, 200, 300, 5));
    assert_ne!(pairs, sample_pairs(&labels, 200, 300, 6));
    assert_eq!(pairs.iter().filter(|p| p.is_same).count(), 200);
    assert_eq!(pairs.len(), 500);
    assert!(pairs.iter().all(|p| p.is_same == (labels[p.a] == labels[p.b])));
    // Uniform: the 300 impostor pairs touch images all over the list.
    let mean = pairs.iter().map(|p| (p.a + p.b) as f64 / 2.0).sum::<f64>() / 500.0;
    assert!((mean - 1500.0).abs() < 150.0, "{mean}");
}

#[test]
fn labels_without_pairs_give_none() {
    for labels in [&[][..], &[4]] {
        assert!(sample_pairs(labels, 10, 10, 0).is_empty());
    }
    assert!(sample_pairs(&[1, 2, 3], 10, 0, 0).is_empty());
    assert_eq!(sample_pairs(&[5, 5], 10, 10, 0), [Pair { a: 0, b: 1, is_same: true, fold: 0 }]);
}

#[test]
#[ignore = "needs MASKINV_DATA"]
fn needs_data_lfw_lists_resolve() -> Result<()> {
    let data = crate::fixture::data();
    let root = data.join("lfw112");
    let pairs = PairList::read(root.join("pairs.txt"))?;
    assert_eq!((pairs.num_folds(), pairs.entries().len()), (7, 4200));
    let folder = FaceFolder::open(root.join("images"))?;
    let resolved = pairs.resolve(&folder)?;
    assert!(resolved.iter().all(|p| p.is_same == (folder.label(p.a) == folder.label(p.b))));

    let people = People::read(root.join("people.txt"))?;
    assert_eq!(people.folds.len(), 7);
    let listed: u32 = people.folds.iter().flatten().map(|p| p.num_images).sum();
    assert_eq!((people.names(0..7).len(), listed as usize), (folder.num_identities(), folder.len()));
    let filter = IdentityFilter { min_images: 2, names: Some(people.names(0..5)) };
    let train = Subset::new(Arc::new(folder), &filter, &root)?;
    assert!(train.num_skipped_identities() > 0 && train.num_identities() < people.names(0..5).len());
    Ok(())
}
