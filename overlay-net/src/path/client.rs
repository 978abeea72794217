//! The daemon's side of the data path's process: starts it, or finds the one that runs, and keeps it
//! told.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::net::UnixStream;

use super::PathConfig;
use super::message::{FromPath, PathChange, PathState, PeerReport, ToPath, receive, send};

const START_LIMIT: Duration = Duration::from_secs(5);
const START_PAUSE: Duration = Duration::from_millis(10);
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A connection to the data path's process.
pub(crate) struct PathClient {
    stream: UnixStream,
    /// What the process was told.
    told: PathState,
    token: u64,
}

impl PathClient {
    /// Connects to the process that runs already, or starts one; says whether it is new.
    pub(crate) async fn open(program: &Path, dir: &Path, config: &PathConfig) -> io::Result<(Self, bool)> {
        if let Ok(client) = Self::connect(&config.socket).await {
            return Ok((client, false));
        }
        let file = dir.join("datapath.json");
        fs::write(&file, serde_json::to_vec(config)?)?;
        let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("datapath.log"))?;
        let mut child = tokio::process::Command::new(program)
            .arg("datapath")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .current_dir("/")
            .spawn()?;
        let deadline = tokio::time::Instant::now() + START_LIMIT;
        loop {
            if let Ok(client) = Self::connect(&config.socket).await {
                // It lives on without the daemon; it is only waited for so that it leaves no zombie.
                tokio::spawn(async move { drop(child.wait().await) });
                return Ok((client, true));
            }
            if let Some(status) = child.try_wait()? {
                return Err(io::Error::other(format!("the data path ended ({status}): {}", last_line(dir))));
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the data path did not start"));
            }
            tokio::time::sleep(START_PAUSE).await;
        }
    }

    async fn connect(socket: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket).await?;
        match tokio::time::timeout(ANSWER_LIMIT, receive(&mut stream)).await {
            Ok(Ok(Some(FromPath::Ready))) => Ok(Self { stream, told: PathState::default(), token: 0 }),
            Ok(Ok(_)) => Err(io::Error::other("the data path speaks another language")),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the data path does not answer")),
        }
    }

    /// Puts `state` in force, all of it, whatever the process knows.
    pub(crate) async fn replace(&mut self, state: PathState) -> io::Result<()> {
        send(&mut self.stream, &ToPath::Replace(Box::new(state.clone()))).await?;
        self.told = state;
        self.sync().await
    }

    /// Puts `state` in force by saying what is new in it; returns once it is.
    pub(crate) async fn update(&mut self, state: PathState) -> io::Result<()> {
        let Some(change) = self.told.change_to(&state) else { return Ok(()) };
        send(&mut self.stream, &ToPath::Change(Box::new(change))).await?;
        self.told = state;
        self.sync().await
    }

    /// Puts a change in force that is known already; returns once it is.
    pub(crate) async fn change(&mut self, change: PathChange) -> io::Result<()> {
        if change == PathChange::default() {
            return Ok(());
        }
        self.told.apply(change.clone());
        send(&mut self.stream, &ToPath::Change(Box::new(change))).await?;
        self.sync().await
    }

    /// Waits until all that was said is in force.
    pub(crate) async fn sync(&mut self) -> io::Result<()> {
        self.token += 1;
        send(&mut self.stream, &ToPath::Sync(self.token)).await?;
        loop {
            match self.answer().await? {
                FromPath::Synced(token) if token == self.token => return Ok(()),
                FromPath::Synced(_) | FromPath::Ready | FromPath::Report(_) => {}
            }
        }
    }

    /// How the tunnels do.
    pub(crate) async fn report(&mut self) -> io::Result<Vec<PeerReport>> {
        send(&mut self.stream, &ToPath::Report).await?;
        loop {
            match self.answer().await? {
                FromPath::Report(reports) => return Ok(reports),
                FromPath::Synced(_) | FromPath::Ready => {}
            }
        }
    }

    async fn answer(&mut self) -> io::Result<FromPath> {
        let answer = tokio::time::timeout(ANSWER_LIMIT, receive(&mut self.stream)).await;
        let answer = answer.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the data path does not answer"))??;
        answer.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the data path has ended"))
    }
}

fn last_line(dir: &Path) -> String {
    let log: PathBuf = dir.join("datapath.log");
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines().last().unwrap_or("its log is empty").to_owned()
}
