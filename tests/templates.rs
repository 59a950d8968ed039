//! IJB-B's and IJB-C's templates, comparisons and searches, against what insightface's scripts give
//! (`tests/fixtures/ijb.py`).

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::DType;
use maskinv::data::TemplateSet;
use maskinv::eval::{BootstrapConfig, Embeddings, Scores, Searches, Templates};

use crate::fixture::Fixture;

const FAR_TARGETS: [f64; 6] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ijb")
}

fn numbers(fixture: &Fixture, name: &str) -> Result<Vec<f64>> {
    Ok(fixture.tensor(name)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// Image and mirrored image added, as `embed` does.
fn features(fixture: &Fixture) -> Result<Embeddings> {
    let both = fixture.tensor("features")?;
    let sum = both.sum(1)?;
    Ok(Embeddings::new(sum.flatten_all()?.to_vec1()?, sum.dim(1)?)?)
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-6, "{found} instead of {expected}");
}

#[test]
fn templates_and_their_scores_match_insightface() -> Result<()> {
    let (set, fixture) = (TemplateSet::open(&folder())?, Fixture::load("ijb")?);
    let templates = Templates::pool(&set.images, &features(&fixture)?)?;
    let expected = numbers(&fixture, "template_features")?;
    assert_eq!(templates.embeddings().values().len(), expected.len());
    templates.embeddings().values().iter().zip(expected).for_each(|(f, e)| close(f64::from(*f), e));
    let comparisons = templates.compare(&set.pairs, &set.people()?)?;
    assert!(comparisons.people().is_some());
    assert_eq!(comparisons.scores().len(), numbers(&fixture, "scores")?.len());
    comparisons.scores().iter().zip(numbers(&fixture, "scores")?).for_each(|(f, e)| close(*f, e));
    let scores = Scores::from_labelled(comparisons.scores(), comparisons.is_same())?;
    close(scores.metrics().auc, numbers(&fixture, "auc")?[0]);
    let (tar, far) = (numbers(&fixture, "tar")?, numbers(&fixture, "far")?);
    for (i, target) in FAR_TARGETS.into_iter().enumerate() {
        assert_eq!(scores.tar_at_closest_far(target), [tar[i], far[i]], "{target}");
    }
    Ok(())
}

#[test]
fn searches_match_insightface() -> Result<()> {
    let (set, fixture) = (TemplateSet::open(&folder())?, Fixture::load("ijb")?);
    let templates = Templates::pool(&set.images, &features(&fixture)?)?;
    let side = |list: &[maskinv::data::PersonTemplate]| {
        let people: Vec<u32> = list.iter().map(|t| t.person).collect();
        Ok::<_, anyhow::Error>((templates.rows(list.iter().map(|t| t.template))?, people))
    };
    let (probes, probe_people) = side(&set.probes)?;
    let config = BootstrapConfig { replicates: 200, ..BootstrapConfig::default() };
    let mut rank_1 = 0.0;
    for (number, gallery) in set.galleries.iter().enumerate() {
        assert_eq!(gallery.name, format!("G{}", number + 1));
        let (known, known_people) = side(&gallery.templates)?;
        let searches = Searches::run(&probes, &probe_people, &known, &known_people)?;
        let figures = searches.figures(&config)?;
        let expected = |name: &str| numbers(&fixture, &format!("g{}_{name}", number + 1));
        assert_eq!([figures.num_mated as f64, figures.num_nonmated as f64], expected("num")?[..]);
        assert_eq!(figures.at_rank.len(), expected("top")?.len());
        for (found, expected) in figures.at_rank.iter().zip(expected("top")?) {
            assert_eq!((found.rate * figures.num_mated as f64).round(), expected);
            let interval = found.interval.context("an interval")?;
            assert!(interval.low <= found.rate && found.rate <= interval.high && interval.low < interval.high);
        }
        rank_1 += figures.at_rank[0].rate * figures.num_mated as f64 / set.probes.len() as f64;
        // Its thresholds, not ours: it accepts one non-mated search fewer, and scores above the threshold only.
        let (tpir, thresholds) = (expected("tpir")?, expected("threshold")?);
        assert!(!tpir.is_empty() && tpir.len() == thresholds.len());
        for (tpir, threshold) in tpir.into_iter().zip(thresholds) {
            let is_hit = |mate: &maskinv::eval::Mate| mate.rank == 1 && mate.score > threshold + 1e-7;
            let hits = searches.searches.iter().filter_map(|s| s.mate).filter(is_hit).count();
            close(hits as f64 / figures.num_mated as f64, tpir);
        }
        // Ours: a tenth of the non-mated searches, and no more, may have a score from the threshold on.
        let at = figures.at_fpir[0];
        let (fpir, tpir) = (at.fpir.context("measured")?, at.tpir.context("measured")?);
        assert!(fpir <= 0.1 && fpir + 1.0 / figures.num_nonmated as f64 > 0.1, "{fpir}");
        assert!(tpir > 0.0 && at.tpir_interval.is_some());
        assert!(figures.at_fpir[2].tpir.is_none(), "a thousandth of sixty searches");
    }
    close(rank_1, numbers(&fixture, "rank1_mean")?[0]);
    Ok(())
}

#[test]
fn wrong_lists_are_errors_that_say_where() -> Result<()> {
    let copy = |file: &str, change: &dyn Fn(String) -> String| -> Result<String> {
        let root = tempfile::tempdir()?;
        let meta = root.path().join("meta");
        std::fs::create_dir(&meta)?;
        for entry in std::fs::read_dir(folder().join("meta"))? {
            let entry = entry?;
            let name = entry.file_name().into_string().expect("a UTF-8 name");
            let mut text = std::fs::read_to_string(entry.path())?;
            if name == file {
                text = change(text);
            }
            std::fs::write(meta.join(name), text)?;
        }
        Ok(TemplateSet::open(root.path()).err().context(format!("{file}: accepted"))?.to_string())
    };
    type Case<'a> = (&'a str, &'a dyn Fn(String) -> String, &'a str);
    let cases: [Case; 7] = [
        ("ijbc_face_tid_mid.txt", &|t| t.replacen(' ', " x", 1), ":1: expected a template's number"),
        ("ijbc_face_tid_mid.txt", &|_| String::new(), ":1: expected image 0"),
        ("ijbc_name_5pts_score.txt", &|t| t.lines().skip(1).collect::<Vec<_>>().join("\n"), ":1: expected image 0 of"),
        ("ijbc_name_5pts_score.txt", &|t| t[..t.len() / 2].to_owned(), "expected"),
        ("ijbc_template_pair_label.txt", &|t| t + "1 2\n", "expected two templates and a label, found 2 fields"),
        ("ijbc_template_pair_label.txt", &|t| t + "987654 2 1\n", "template 987654 has no image"),
        ("ijbc_1N_gallery_G1.csv", &|t| t + "nobody,1,a.png\n", "expected a template's number, found \"nobody\""),
    ];
    for (file, change, expected) in cases {
        let error = copy(file, change)?;
        assert!(error.contains(expected), "{error}");
    }
    let empty = tempfile::tempdir()?;
    let error = TemplateSet::open(empty.path()).err().context("accepted")?.to_string();
    assert!(error.contains("meta: expected the folder of the lists"), "{error}");
    std::fs::create_dir(empty.path().join("meta"))?;
    let error = TemplateSet::open(empty.path()).err().context("accepted")?.to_string();
    assert!(error.contains("expected one file NAME_face_tid_mid.txt"), "{error}");
    Ok(())
}
