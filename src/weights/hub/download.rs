//! Download of a file to the cache: resumed after an interruption, checked, and visible only when complete.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use super::HubConfig;
use super::cache::Cache;
use super::client::{HubClient, RETRIES, RETRY_DELAY, Remote, Stop};
use crate::error::{Error, Result};
use crate::files;
use crate::weights::hub_file::HubFile;

/// Implements [`super::Hub::fetch`].
pub(super) fn fetch(
    config: &HubConfig,
    file: &HubFile,
    expected_sha256: Option<&str>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<PathBuf> {
    let error = |what: String| Error::Hub { reference: file.to_string(), what };
    let root = config.cache.clone().unwrap_or_else(hf_hub::resolve_cache_dir);
    let cache = Cache::new(root.clone(), file);
    if let Some(path) = cache.lookup() {
        if let Some(expected) = expected_sha256
            && let Some(found) = other_sha256(&path, expected)?
        {
            // Contents that match their name in the cache came intact from the hub, and another program may need them.
            let is_intact = path.canonicalize().is_ok_and(|blob| blob.file_name().is_some_and(|name| *name == *found));
            if is_intact || config.offline {
                return Err(error(format!("SHA-256: expected {expected}, found {found} in the cache")));
            }
            cache.discard(&path)?;
            return Err(error(format!(
                "SHA-256: expected {expected}, found {found}; removed from the cache, try again"
            )));
        }
        return Ok(path);
    }
    if config.offline {
        return Err(error(format!(
            "not in the cache {}, and offline: fetch it once without --offline",
            root.display()
        )));
    }
    // The async runtime gets a thread of its own, because the caller may already be in a runtime.
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|e| error(format!("cannot start the async runtime: {e}")))?;
            let client = HubClient::new(config, file)?;
            let progress = move |done, total| {
                // Ignored: it is no error if nobody receives the progress.
                let _ = sender.send((done, total));
            };
            runtime.block_on(Download { client, cache, expected_sha256 }.run(progress))
        });
        for (done, total) in receiver {
            progress(done, total);
        }
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

struct Download<'a> {
    client: HubClient<'a>,
    cache: Cache<'a>,
    expected_sha256: Option<&'a str>,
}

impl Download<'_> {
    async fn run(&self, mut progress: impl FnMut(u64, u64)) -> Result<PathBuf> {
        let remote = self.client.head().await?;
        if let (Some(expected), Some(found)) = (self.expected_sha256, remote.sha256())
            && expected != found
        {
            return Err(self.client.error(format!("SHA-256: expected {expected}, the hub has {found}")));
        }
        let _lock = self.cache.lock(&remote.etag)?;
        let blob = self.cache.blob(&remote.etag)?;
        // The contents may be cached under another name, or have arrived while this thread waited for the lock.
        if !blob.is_file() || self.found_other(&blob, &remote)?.is_some() {
            let part = self.cache.blob(&format!("{}.incomplete", remote.etag))?;
            self.receive(&part, &remote, |done| progress(done, remote.size)).await?;
            fs::rename(&part, &blob).map_err(Error::io(&blob))?;
        }
        self.cache.link(&remote.commit, &remote.etag)
    }

    /// Returns the SHA-256 of a file if it is not the expected one.
    fn found_other(&self, path: &Path, remote: &Remote) -> Result<Option<String>> {
        match self.expected_sha256.or(remote.sha256()) {
            Some(expected) => other_sha256(path, expected),
            None => Ok(None),
        }
    }

    /// Completes `part`, which may hold the start of the file from an earlier attempt, and checks it.
    async fn receive(&self, part: &Path, remote: &Remote, mut progress: impl FnMut(u64)) -> Result<()> {
        let mut out = OpenOptions::new().create(true).append(true).open(part).map_err(Error::io(part))?;
        let mut done = out.metadata().map_err(Error::io(part))?.len();
        if done > remote.size {
            restart(&out, part, &mut done)?;
        }
        let (mut is_resumed, mut is_second) = (done > 0, false);
        loop {
            is_resumed |= self.fill(&mut out, part, remote, &mut done, &mut progress).await?;
            out.sync_all().map_err(Error::io(part))?;
            let Some(found) = self.found_other(part, remote)? else { return Ok(()) };
            restart(&out, part, &mut done)?;
            // Pieces of several attempts may not match. A download in one piece is what the hub has, so retry once from
            // the start.
            if is_resumed && !is_second {
                is_second = true;
            } else {
                let expected = self.expected_sha256.or(remote.sha256()).unwrap_or_default();
                let what = format!("SHA-256: expected {expected}, found {found}; download discarded, try again");
                return Err(self.client.error(what));
            }
        }
    }

    /// Receives until the file is complete; returns whether that took more than one attempt. Gives up after too many
    /// attempts in a row without new bytes.
    async fn fill(
        &self,
        out: &mut File,
        part: &Path,
        remote: &Remote,
        done: &mut u64,
        progress: &mut impl FnMut(u64),
    ) -> Result<bool> {
        let (mut most, mut barren, mut is_resumed) = (*done, 0, false);
        progress(*done);
        while *done < remote.size {
            let what = match self.client.read(remote, done, out, progress).await {
                Ok(()) => break,
                Err(Stop::Final(e)) => return Err(e),
                Err(Stop::Broken(what)) => what,
                Err(Stop::NoRange) => {
                    restart(out, part, done)?;
                    "the server cannot resume a download".into()
                }
            };
            is_resumed = true;
            barren = if *done > most { 0 } else { barren + 1 };
            most = most.max(*done);
            if barren > RETRIES {
                let kept = format!("stopped at {done} of {} bytes ({what}): try again to resume", remote.size);
                return Err(self.client.error(kept));
            }
            tokio::time::sleep(RETRY_DELAY * 2u32.pow(barren)).await;
        }
        Ok(is_resumed)
    }
}

/// Empties a file that is open for appending.
fn restart(out: &File, part: &Path, done: &mut u64) -> Result<()> {
    *done = 0;
    out.set_len(0).map_err(Error::io(part))
}

/// Returns the SHA-256 of a file in hexadecimal digits if it is not `expected`.
pub(super) fn other_sha256(path: &Path, expected: &str) -> Result<Option<String>> {
    let found = files::sha256(path)?;
    Ok((found != expected).then_some(found))
}
