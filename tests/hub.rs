//! The real client over real HTTP against a server of this machine; no test leaves it or touches the user's cache.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use maskinv::data::{Dataset, Export, VerificationFaces, open_source, write_parquet};
use maskinv::weights::{Hub, HubConfig};
use maskinv::weights::{HubFile, ModelRef, WeightsFile};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::hub_server::{COMMIT, Request, Server, Site};

/// SHA-256 of [`body`], by `sha256sum`.
const SHA256: &str = "479a66ef94f9b021fca4aa4b2348ae708c9470f872251455f130b4662f61e74e";

/// 200,000 bytes that differ from place to place.
fn body() -> Vec<u8> {
    (0..200_000u32).map(|i| (i % 251) as u8 ^ (i >> 10) as u8).collect()
}

fn site() -> Site {
    Site { body: body(), etag: SHA256.into(), ..Site::default() }
}

fn file() -> Result<HubFile> {
    Ok(HubFile::new("owner", "repo", "main", "folder/model.onnx")?)
}

/// A client with an empty cache.
struct Client {
    config: HubConfig,
    cache: TempDir,
}

impl Client {
    fn of(endpoint: &str) -> Result<Self> {
        let cache = tempfile::tempdir()?;
        let config =
            HubConfig { endpoint: Some(endpoint.into()), cache: Some(cache.path().to_owned()), ..HubConfig::default() };
        Ok(Self { config, cache })
    }

    fn fetch(&self, sha256: Option<&str>) -> Result<PathBuf> {
        Ok(Hub::new(self.config.clone()).fetch(&file()?, sha256, &mut |_, _| ())?)
    }

    /// The message of a fetch that must fail.
    fn error(&self, sha256: Option<&str>) -> Result<String> {
        let error = self.fetch(sha256).err().context("the fetch succeeded")?.to_string();
        assert!(error.starts_with("hf://owner/repo/folder/model.onnx: "), "{error}");
        assert!(!error.contains('\n'), "more than a line: {error:?}");
        Ok(error)
    }

    fn repo(&self) -> PathBuf {
        self.cache.path().join("models--owner--repo")
    }

    /// Names of what is in `blobs/`.
    fn blobs(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.repo().join("blobs")).into_iter().flatten().flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    }
}

fn assert_contents(path: &Path) -> Result<()> {
    assert!(std::fs::read(path)? == body(), "{} has other contents", path.display());
    Ok(())
}

fn gets(requests: &[Request]) -> Vec<&Request> {
    requests.iter().filter(|r| r.method == "GET").collect()
}

#[test]
fn a_fetched_file_is_in_the_layout_of_the_python_cache_and_is_not_asked_for_again() -> Result<()> {
    let server = Server::start(site())?;
    let client = Client::of(&server.url())?;
    let mut seen = Vec::new();
    let path =
        Hub::new(client.config.clone()).fetch(&file()?, Some(SHA256), &mut |done, total| seen.push((done, total)))?;
    assert_contents(&path)?;
    assert_eq!(path, client.repo().join("snapshots").join(COMMIT).join("folder/model.onnx"));
    assert_eq!(path.canonicalize()?, client.repo().join("blobs").join(SHA256).canonicalize()?);
    #[cfg(unix)]
    assert!(std::fs::read_link(&path)?.is_relative());
    assert_eq!(std::fs::read_to_string(client.repo().join("refs/main"))?, COMMIT);
    assert_eq!(client.blobs(), [SHA256]);
    assert_eq!((seen.first(), seen.last()), (Some(&(0, 200_000)), Some(&(200_000, 200_000))));
    assert!(seen.is_sorted());
    assert!(!server.take_requests().is_empty());
    assert_eq!(client.fetch(Some(SHA256))?, path);
    assert_eq!(client.fetch(None)?, path);
    assert!(server.take_requests().is_empty(), "a file in the cache was asked for");
    Ok(())
}

#[test]
fn a_cache_written_by_python_is_used() -> Result<()> {
    // Nobody listens there: any request would fail.
    let client = Client::of("http://127.0.0.1:1")?;
    let snapshot = client.repo().join("snapshots").join(COMMIT).join("folder");
    std::fs::create_dir_all(&snapshot)?;
    std::fs::create_dir_all(client.repo().join("refs"))?;
    std::fs::write(client.repo().join("refs/main"), COMMIT)?;
    std::fs::write(snapshot.join("model.onnx"), body())?;
    assert_contents(&client.fetch(Some(SHA256))?)?;
    let at_commit = HubFile::new("owner", "repo", COMMIT, "folder/model.onnx")?;
    let file = Hub::new(client.config.clone()).resolve(&ModelRef::Hub(at_commit), &mut |_, _| ())?;
    assert_eq!(file, WeightsFile::Path(snapshot.join("model.onnx")));
    Ok(())
}

#[test]
fn the_token_goes_to_the_hub_and_not_to_its_storage() -> Result<()> {
    let storage = Server::start(site())?;
    let server = Server::start(Site { storage: Some(storage.url()), token: Some("hf_x".into()), ..site() })?;
    let mut client = Client::of(&server.url())?;
    client.config.token = Some("hf_x".into());
    assert_contents(&client.fetch(None)?)?;
    let (to_hub, to_storage) = (server.take_requests(), storage.take_requests());
    assert!(to_hub.iter().all(|r| r.authorization.as_deref() == Some("Bearer hf_x")), "{to_hub:?}");
    assert_eq!(gets(&to_storage).len(), 1);
    assert!(to_storage.iter().all(|r| r.authorization.is_none()), "{to_storage:?}");
    // What the storage calls the contents does not matter; what the hub says of them does.
    assert_eq!(client.blobs(), [SHA256]);
    Ok(())
}

#[test]
fn a_renamed_repository_is_followed() -> Result<()> {
    let server = Server::start(Site { renamed_from: Some("/old/name"), ..site() })?;
    let client = Client::of(&server.url())?;
    let old = HubFile::new("old", "name", "main", "folder/model.onnx")?;
    assert_contents(&Hub::new(client.config.clone()).fetch(&old, None, &mut |_, _| ())?)
}

#[test]
fn a_hub_that_sends_to_another_server_does_not_take_the_token_there() -> Result<()> {
    let other = Server::start(site())?;
    let server = Server::start(Site { moved_to: Some(other.url()), ..site() })?;
    let mut client = Client::of(&server.url())?;
    client.config.token = Some("hf_x".into());
    let error = client.error(None)?;
    assert!(error.contains("is not a model hub: expected a commit"), "{error}");
    assert!(other.take_requests().is_empty(), "nothing was asked there");
    assert!(client.blobs().is_empty());
    Ok(())
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() -> Result<()> {
    for storage in [false, true] {
        let behind = Server::start(Site { cuts: vec![70_000, 50_000], ..site() })?;
        let front = Server::start(Site { storage: Some(behind.url()), ..site() })?;
        let client = Client::of(&if storage { front.url() } else { behind.url() })?;
        assert_contents(&client.fetch(Some(SHA256))?)?;
        let requests = behind.take_requests();
        let ranges: Vec<_> = gets(&requests).iter().map(|r| r.range.clone()).collect();
        assert_eq!(ranges, [None, Some("bytes=70000-199999".into()), Some("bytes=120000-199999".into())]);
        assert_eq!(client.blobs(), [SHA256]);
    }
    Ok(())
}

#[test]
fn a_transfer_that_was_given_up_goes_on_in_the_next_call() -> Result<()> {
    let server = Server::start(Site { cuts: vec![70_000, 0, 0, 0, 0], ..site() })?;
    let client = Client::of(&server.url())?;
    let error = client.error(None)?;
    assert!(error.contains("stopped at 70000 of 200000 bytes"), "{error}");
    assert_eq!(client.blobs(), [format!("{SHA256}.incomplete")]);
    server.take_requests();
    let mut first = None;
    let path = Hub::new(client.config.clone()).fetch(&file()?, None, &mut |done, _| {
        first.get_or_insert(done);
    })?;
    assert_contents(&path)?;
    assert_eq!(first, Some(70_000));
    let requests = server.take_requests();
    assert_eq!(gets(&requests)[0].range.as_deref(), Some("bytes=70000-199999"));
    assert_eq!(client.blobs(), [SHA256]);
    Ok(())
}

#[test]
fn a_server_without_ranges_is_read_from_the_start_again() -> Result<()> {
    let server = Server::start(Site { cuts: vec![70_000], ignores_range: true, ..site() })?;
    let client = Client::of(&server.url())?;
    assert_contents(&client.fetch(Some(SHA256))?)
}

#[test]
fn pieces_that_do_not_belong_together_are_fetched_again_as_one() -> Result<()> {
    let server = Server::start(Site { cuts: vec![70_000], spoils_ranges: true, ..site() })?;
    let client = Client::of(&server.url())?;
    assert_contents(&client.fetch(None)?)?;
    let requests = server.take_requests();
    assert_eq!(gets(&requests).iter().map(|r| r.range.is_some()).collect::<Vec<_>>(), [false, true, false]);
    Ok(())
}

#[test]
fn a_server_that_fails_for_a_moment_is_asked_again() -> Result<()> {
    let server = Server::start(Site { failures: 2, ..site() })?;
    let client = Client::of(&server.url())?;
    assert_contents(&client.fetch(None)?)?;
    server.set(|s| s.failures = usize::MAX);
    let other = Client::of(&server.url())?;
    let error = other.error(None)?;
    assert!(error.contains("HTTP 500"), "{error}");
    Ok(())
}

#[test]
fn refusals_say_what_helps() -> Result<()> {
    let server = Server::start(site())?;
    let mut client = Client::of(&server.url())?;
    let cases = [
        ((401, "GatedRepo", "Access is restricted."), None, "set HF_TOKEN"),
        ((401, "RepoNotFound", "Invalid credentials"), Some("hf_x"), "the token in HF_TOKEN was rejected"),
        ((403, "GatedRepo", "Access is restricted."), None, "then set HF_TOKEN"),
        ((403, "GatedRepo", "Access is restricted."), Some("hf_x"), "HF_TOKEN has no access to owner/repo"),
        ((404, "RepoNotFound", ""), None, "there is no repository owner/repo"),
        ((404, "RevisionNotFound", ""), None, "owner/repo has no revision main"),
        ((404, "EntryNotFound", ""), None, "owner/repo has no file folder/model.onnx at main"),
        ((404, "", ""), None, "the repository, the revision or the file was not found"),
        ((429, "", "slow down"), None, "too many requests"),
    ];
    for (refuse, token, expected) in cases {
        server.set(|s| s.refuse = Some(refuse));
        client.config.token = token.map(String::from);
        let error = client.error(None)?;
        let status = format!("(HTTP {}", refuse.0);
        assert!(error.contains(expected) && error.contains(&status) && error.contains(refuse.2), "{refuse:?}: {error}");
        assert!(!error.contains("hf_x"), "the token is printed: {error}");
    }
    assert!(client.blobs().is_empty());
    Ok(())
}

#[test]
fn answers_that_a_proxy_compressed_are_refused_and_not_cached() -> Result<()> {
    let server = Server::start(Site { is_compressed: true, ..site() })?;
    let client = Client::of(&server.url())?;
    let error = client.error(None)?;
    assert!(error.contains("compresses its answers (gzip)") && error.contains("NO_PROXY"), "{error}");
    assert!(client.blobs().is_empty());
    server.set(|s| s.is_compressed = false);
    assert_contents(&client.fetch(Some(SHA256))?)
}

#[test]
fn a_storage_that_refuses_leaves_nothing_behind() -> Result<()> {
    let storage = Server::start(Site { refuse: Some((403, "", "expired")), ..site() })?;
    let server = Server::start(Site { storage: Some(storage.url()), ..site() })?;
    let client = Client::of(&server.url())?;
    let error = client.error(None)?;
    assert!(error.contains("HTTP 403: expired"), "{error}");
    storage.set(|s| s.refuse = None);
    assert_contents(&client.fetch(Some(SHA256))?)
}

#[test]
fn contents_with_another_hash_are_not_kept() -> Result<()> {
    let other = "0".repeat(64);
    // The hub says itself that it has another file: nothing is fetched.
    let server = Server::start(site())?;
    let client = Client::of(&server.url())?;
    let error = client.error(Some(&other))?;
    assert!(error.contains(&format!("expected {other}, the hub has {SHA256}")), "{error}");
    assert!(gets(&server.take_requests()).is_empty());
    // The hub does not know the hash of small files, or gives other bytes than it promised.
    for etag in [COMMIT.to_owned(), other.clone()] {
        server.set(|s| s.etag = etag);
        let client = Client::of(&server.url())?;
        let error = client.error(Some(&other))?;
        assert!(error.contains(&format!("expected {other}, found {SHA256}")), "{error}");
        assert!(client.fetch(Some(&other)).is_err());
        assert!(client.repo().join("snapshots").read_dir().is_err(), "a wrong file is visible");
    }
    // The file in the cache was spoiled: it goes, and the next fetch brings it again.
    server.set(|s| s.etag = SHA256.into());
    let path = client.fetch(Some(SHA256))?;
    std::fs::write(&path, b"spoiled")?;
    let error = client.error(Some(SHA256))?;
    assert!(
        error.contains(&format!("expected {SHA256}, found ")) && error.contains("removed from the cache"),
        "{error}"
    );
    assert!(client.blobs().is_empty());
    assert_contents(&client.fetch(Some(SHA256))?)
}

#[test]
fn an_answer_that_names_files_outside_the_cache_is_refused() -> Result<()> {
    for etag in ["../../../evil", "", "a/b", "..", "a.incomplete"] {
        let server = Server::start(Site { etag: etag.into(), ..site() })?;
        let client = Client::of(&server.url())?;
        let error = client.error(None)?;
        assert!(error.contains("is not a model hub"), "{etag}: {error}");
        assert_eq!(client.cache.path().read_dir()?.count(), 0);
    }
    Ok(())
}

#[test]
fn offline_uses_the_cache_and_sends_nothing() -> Result<()> {
    let server = Server::start(site())?;
    let mut client = Client::of(&server.url())?;
    client.config.offline = true;
    let error = client.error(None)?;
    assert!(error.contains("not in the cache") && error.contains("offline"), "{error}");
    assert!(server.take_requests().is_empty());
    client.config.offline = false;
    let path = client.fetch(None)?;
    server.take_requests();
    client.config.offline = true;
    assert_eq!(client.fetch(Some(SHA256))?, path);
    assert!(server.take_requests().is_empty());
    Ok(())
}

#[test]
fn nobody_at_the_endpoint_is_one_clear_line() -> Result<()> {
    // A port that a stopped server left may be given to the server of another test; nobody is given port 1.
    let url = "http://127.0.0.1:1";
    let error = Client::of(url)?.error(None)?;
    for part in [url, "cannot be reached", "refused", "HF_ENDPOINT", "--offline"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    for wrong in ["ftp://127.0.0.1", "127.0.0.1", "file:///etc"] {
        let error = Client::of(wrong)?.error(None)?;
        assert!(error.contains("HF_ENDPOINT") && error.contains(wrong), "{error}");
    }
    Ok(())
}

#[test]
fn two_fetches_at_once_transfer_once() -> Result<()> {
    let server = Server::start(site())?;
    let client = Client::of(&server.url())?;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4).map(|_| scope.spawn(|| client.fetch(Some(SHA256)))).collect();
        workers.into_iter().try_for_each(|w| assert_contents(&w.join().expect("no panic")?))
    })?;
    assert_eq!(gets(&server.take_requests()).len(), 1);
    Ok(())
}

/// Runs itself again in an environment that would lead the client elsewhere.
#[test]
fn tokens_endpoints_and_proxies_of_the_environment_are_not_used() -> Result<()> {
    const CHILD: &str = "MASKINV_TEST_HUB_ENVIRONMENT";
    if std::env::var_os(CHILD).is_some() {
        let server = Server::start(site())?;
        let client = Client::of(&server.url())?;
        assert_contents(&client.fetch(Some(SHA256))?)?;
        let requests = server.take_requests();
        assert!(requests.len() >= 2 && requests.iter().all(|r| r.authorization.is_none()), "{requests:?}");
        return Ok(());
    }
    let home = tempfile::tempdir()?;
    std::fs::write(home.path().join("token"), "hf_from_the_users_folder")?;
    let name = "hub::tokens_endpoints_and_proxies_of_the_environment_are_not_used";
    for with_token in [false, true] {
        let mut child = Command::new(std::env::current_exe()?);
        child
            .args(["--exact", name])
            .env(CHILD, "1")
            .env("HF_HOME", home.path())
            .env("HF_ENDPOINT", "http://127.0.0.1:1");
        child.env("HTTP_PROXY", "http://127.0.0.1:1").env("http_proxy", "http://127.0.0.1:1").env_remove("NO_PROXY");
        child.env("HF_HUB_CACHE", home.path().join("hub")).env_remove("no_proxy").env_remove("HF_TOKEN");
        if with_token {
            child.env("HF_TOKEN", "hf_from_the_environment");
        }
        let output = child.output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }
    assert!(!home.path().join("hub").exists(), "the user's cache was touched");
    Ok(())
}

#[test]
fn a_data_set_is_fetched_once_and_opened() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let parquet = dir.path().join("x.parquet");
    let faces = VerificationFaces::open(Path::new("tests/fixtures/verification/numpy.bin"))?;
    write_parquet(&mut Export::new(&faces, &mut |_| ()), &parquet)?;
    let body = std::fs::read(&parquet)?;
    let sha256: String = Sha256::digest(&body).iter().map(|byte| format!("{byte:02x}")).collect();
    let server = Server::start(Site { body, etag: sha256.clone(), ..Site::default() })?;
    let client = Client::of(&server.url())?;
    let hub = Hub::new(client.config.clone());
    let reference = "hf://datasets/owner/faces";
    let folder = hub.fetch_dataset(reference)?;
    assert!(folder.ends_with("default/train"), "{}", folder.display());
    let source = open_source(&folder)?;
    assert_eq!((source.images.len(), source.images.get(7)?), (8, faces.get(7)?));
    server.take_requests();
    assert_eq!(hub.fetch_dataset("hf://datasets/owner/faces/default/train")?, folder);
    let offline = Hub::new(HubConfig { offline: true, ..client.config.clone() });
    assert_eq!(offline.fetch_dataset(reference)?, folder);
    assert!(server.take_requests().is_empty(), "a data set in the cache was asked for");

    let refused = |hub: &Hub, reference: &str, expected: &str| -> Result<()> {
        let error = hub.fetch_dataset(reference).err().context("it was fetched")?.to_string();
        assert!(error.starts_with(reference) && error.contains(expected) && !error.contains('\n'), "{error}");
        Ok(())
    };
    refused(
        &hub,
        "hf://datasets/owner/faces/default/test",
        "expected a configuration and split of [\"default/train\"]",
    )?;
    refused(&hub, "hf://datasets/owner", "expected hf://datasets/owner/name")?;
    refused(&hub, "hf://datasets/../faces", "expected hf://datasets/owner/name")?;
    refused(&offline, "hf://datasets/owner/others", "offline")?;
    refused(&hub, "hf://datasets/owner/others", "owner/others")?;

    // The cache was spoilt.
    let blob = folder.join("0000.parquet").canonicalize()?;
    std::fs::write(&blob, b"PAR1 not really")?;
    refused(&offline, reference, "SHA-256: expected ")
}
