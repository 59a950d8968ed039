//! A Hugging Face hub of one file on a port of this machine, which can be told to misbehave.

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as it arrived.
#[derive(Clone, Debug, Default)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
}

/// What the server has, and what it does wrong.
#[derive(Clone, Default)]
pub struct Site {
    /// The contents of the file.
    pub body: Vec<u8>,
    /// Its ETag.
    pub etag: String,
    /// Where large files are: the base URL of another server.
    pub storage: Option<String>,
    /// The only token that may read.
    pub token: Option<String>,
    /// Status, `X-Error-Code` and `X-Error-Message` of every answer.
    pub refuse: Option<(u16, &'static str, &'static str)>,
    /// How many requests from now on are answered with 500.
    pub failures: usize,
    /// After how many bytes of contents each of the coming transfers is cut off.
    pub cuts: Vec<usize>,
    /// Whether a proxy compresses what it passes on.
    pub is_compressed: bool,
    /// Whether `Range` is ignored.
    pub ignores_range: bool,
    /// Whether a part that is asked for is not what the whole file has there.
    pub spoils_ranges: bool,
    /// The folder that the repository was renamed from.
    pub renamed_from: Option<&'static str>,
    /// The base URL of the server that everything is said to have moved to.
    pub moved_to: Option<String>,
}

struct Shared {
    site: Mutex<Site>,
    requests: Mutex<Vec<Request>>,
    is_closed: Mutex<bool>,
}

/// A running server; it ends when it is dropped.
pub struct Server {
    shared: Arc<Shared>,
    port: u16,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    pub fn start(site: Site) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let shared =
            Arc::new(Shared { site: Mutex::new(site), requests: Mutex::default(), is_closed: Mutex::new(false) });
        let for_thread = shared.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if *for_thread.is_closed.lock().expect("no test panics with the lock") {
                    return;
                }
                let shared = for_thread.clone();
                // A client that goes away in the middle is what some tests are about.
                std::thread::spawn(move || drop(answer(&shared, stream)));
            }
        });
        Ok(Self { shared, port, thread: Some(thread) })
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Changes what the server does.
    pub fn set(&self, change: impl FnOnce(&mut Site)) {
        change(&mut self.shared.site.lock().expect("no test panics with the lock"));
    }

    /// The requests since the last call.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.shared.requests.lock().expect("no test panics with the lock"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        *self.shared.is_closed.lock().expect("no test panics with the lock") = true;
        // Wakes the thread that waits for the next client.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn answer(shared: &Shared, mut stream: TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let request = read_request(&stream)?;
    shared.requests.lock().expect("no test panics with the lock").push(request.clone());
    let (head, body) = reply(&mut shared.site.lock().expect("no test panics with the lock"), &request);
    stream.write_all(head.as_bytes())?;
    stream.write_all(&body)?;
    stream.shutdown(Shutdown::Write)?;
    // The client closes first, or what it has not read yet would be lost.
    std::io::copy(&mut stream, &mut std::io::sink())?;
    Ok(())
}

fn read_request(stream: &TcpStream) -> Result<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().context("no request")??;
    let mut words = first.split(' ').map(str::to_owned);
    let mut request = Request {
        method: words.next().unwrap_or_default(),
        path: words.next().unwrap_or_default(),
        ..Request::default()
    };
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => request.range = Some(value.into()),
            "authorization" => request.authorization = Some(value.into()),
            _ => {}
        }
    }
    Ok(request)
}

/// Head and body of the answer; the body may be shorter than the head says.
fn reply(site: &mut Site, request: &Request) -> (String, Vec<u8>) {
    let empty = |status: u16, headers: &str| {
        let close = "Connection: close\r\nContent-Length: 0\r\n\r\n";
        (format!("HTTP/1.1 {status} x\r\n{headers}{close}"), Vec::new())
    };
    if site.failures > 0 {
        site.failures -= 1;
        return empty(500, "");
    }
    if let Some((status, code, message)) = site.refuse {
        return empty(status, &format!("X-Error-Code: {code}\r\nX-Error-Message: {message}\r\n"));
    }
    if site.token.is_some() && request.authorization != site.token.as_ref().map(|t| format!("Bearer {t}")) {
        return empty(401, "X-Error-Code: RepoNotFound\r\nX-Error-Message: Invalid username or password.\r\n");
    }
    if let Some(other) = &site.moved_to {
        return empty(307, &format!("Location: {other}{}\r\n", request.path));
    }
    if let Some(old) = site.renamed_from
        && let Some(rest) = request.path.strip_prefix(old)
    {
        return empty(307, &format!("Location: /owner/repo{rest}\r\n"));
    }
    let names: Vec<&str> = request.path.split('/').collect();
    // What the hub says of the branch of its own parquet files.
    if let ["", "api", "datasets", "owner", "faces", "revision", "refs%2Fconvert%2Fparquet"] = names[..] {
        let body = format!(
            r#"{{"id": "owner/faces", "sha": "{COMMIT}", "siblings": [{{"rfilename": "default/train/0000.parquet"}}]}}"#
        );
        let head = "HTTP/1.1 200 x\r\nContent-Type: application/json\r\nConnection: close\r\n";
        return (format!("{head}Content-Length: {}\r\n\r\n", body.len()), body.into_bytes());
    }
    let is_known = match names[..] {
        ["", "datasets", "owner", "faces", "resolve", revision, "default", "train", "0000.parquet"] => {
            ["refs%2Fconvert%2Fparquet", COMMIT].contains(&revision)
        }
        ["", "storage", etag] => etag == site.etag,
        ["", "owner", "repo", "resolve", revision, "folder", "model.onnx"] => ["main", COMMIT].contains(&revision),
        _ => false,
    };
    if !is_known {
        return empty(404, "X-Error-Code: EntryNotFound\r\nX-Error-Message: Entry not found\r\n");
    }
    let (etag, size) = (&site.etag, site.body.len());
    if site.is_compressed {
        let head = format!("HTTP/1.1 200 x\r\nX-Repo-Commit: {COMMIT}\r\nETag: W/\"{etag}-gzip\"\r\n");
        return (
            format!("{head}Content-Encoding: gzip\r\nContent-Length: 20\r\nConnection: close\r\n\r\n"),
            Vec::new(),
        );
    }
    let about = format!("X-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {size}\r\n");
    if let Some(storage) = &site.storage {
        return empty(302, &format!("{about}ETag: \"of-the-pointer\"\r\nLocation: {storage}/storage/{etag}\r\n"));
    }
    contents(site, request)
}

/// The file itself, as the hub gives small files and the storage gives large ones.
fn contents(site: &mut Site, request: &Request) -> (String, Vec<u8>) {
    let size = site.body.len();
    let from = request.range.as_deref().filter(|_| !site.ignores_range);
    let from = from.and_then(|r| r.strip_prefix("bytes=")?.split('-').next()?.parse().ok()).unwrap_or(0usize).min(size);
    let mut body = site.body[from..].to_vec();
    if from > 0 && site.spoils_ranges {
        body.iter_mut().for_each(|b| *b ^= 1);
    }
    let status = if from > 0 { 206 } else { 200 };
    let head = format!(
        "HTTP/1.1 {status} x\r\nConnection: close\r\nX-Repo-Commit: {COMMIT}\r\nETag: \"{}\"\r\nContent-Length: {}\r\n\r\n",
        site.etag,
        body.len()
    );
    if request.method == "HEAD" {
        return (head, Vec::new());
    }
    if !site.cuts.is_empty() {
        body.truncate(site.cuts.remove(0));
    }
    (head, body)
}
