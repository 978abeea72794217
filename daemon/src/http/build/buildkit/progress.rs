//! What a build's client sees of it: its steps ("vertexes"), what they write, and how far they are.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};
use skep_api::buildkit::{StatusResponse, Timestamp, Vertex, VertexLog, VertexStatus};
use skep_engine::{BuildOutput, BuildStep, LogSource};
use tokio::sync::watch;

/// What is kept of a step's output, in bytes.
const LOG_LEN_MAX: usize = 2 << 20;
/// A number that no step of the Dockerfile has: those are counted from 1.
const OWN_STEPS: usize = usize::MAX / 2;

/// All that was told so far; whoever asks hears it from the beginning.
pub(super) struct Progress {
    told: Mutex<Told>,
    /// How much there is.
    news: watch::Sender<usize>,
}

#[derive(Default)]
struct Told {
    /// Tells steps from those of other builds, which clients show beside them.
    build: String,
    messages: Vec<StatusResponse>,
    is_over: bool,
    steps: BTreeMap<usize, Running>,
    own: usize,
}

struct Running {
    vertex: Vertex,
    written: usize,
}

/// A step of the builder's own.
#[derive(Clone, Copy)]
pub(super) struct OwnStep(usize);

impl Progress {
    pub(super) fn new(build: &str) -> Self {
        let told = Told { build: build.to_owned(), ..Told::default() };
        Self { told: Mutex::new(told), news: watch::Sender::default() }
    }

    fn change(&self, change: impl FnOnce(&mut Told)) {
        let len = {
            let mut told = self.lock();
            change(&mut told);
            told.messages.len()
        };
        self.news.send_replace(len);
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing more comes.
    pub(super) fn end(&self) {
        self.change(|told| told.is_over = true);
    }

    /// What follows the first `seen` messages; waits for it. None: that was all.
    pub(super) async fn next(&self, seen: usize) -> Option<StatusResponse> {
        let mut news = self.news.subscribe();
        loop {
            {
                let told = self.lock();
                if let Some(message) = told.messages.get(seen) {
                    return Some(message.clone());
                }
                if told.is_over {
                    return None;
                }
            }
            news.changed().await.ok()?;
        }
    }

    /// Tells of a step of the builder's own.
    pub(super) fn begin(&self, name: &str) -> OwnStep {
        let mut number = 0;
        self.change(|told| {
            told.own += 1;
            number = OWN_STEPS + told.own;
            told.start(number, name.to_owned());
        });
        OwnStep(number)
    }

    /// How far a step is: one line below it.
    pub(super) fn note(&self, step: OwnStep, line: &str, bytes: u64, is_done: bool) {
        self.change(|told| {
            let Some(running) = told.steps.get(&step.0) else { return };
            let now = now();
            let status = VertexStatus {
                id: line.to_owned(),
                vertex: running.vertex.digest.clone(),
                name: line.to_owned(),
                current: i64::try_from(bytes).unwrap_or(i64::MAX),
                timestamp: Some(now),
                started: running.vertex.started,
                completed: is_done.then_some(now),
                ..VertexStatus::default()
            };
            told.messages.push(StatusResponse { statuses: vec![status], ..StatusResponse::default() });
        });
    }

    pub(super) fn finish(&self, step: OwnStep, failure: Option<&str>) {
        self.change(|told| told.finish(step.0, failure));
    }

    /// Tells of what the builder did.
    pub(super) fn tell(&self, output: BuildOutput) {
        self.change(|told| match output {
            BuildOutput::Started(step) if step.place.is_some() => told.start(step.number, name(&step)),
            // Of what changes no file, nothing is shown unless it fails.
            BuildOutput::Started(step) => told.hold(step.number, name(&step)),
            BuildOutput::Cached(number) => {
                if let Some(step) = told.steps.get_mut(&number) {
                    step.vertex.cached = true;
                }
            }
            BuildOutput::Written(number, source, bytes) => told.write(number, source, bytes),
            BuildOutput::Ended(number, _) => told.finish(number, None),
            BuildOutput::Failed(number, why) => told.finish(number, Some(&why)),
            BuildOutput::Running(..) | BuildOutput::Text(_) | BuildOutput::Image(_) => {}
        });
    }
}

impl Told {
    fn start(&mut self, number: usize, name: String) {
        self.hold(number, name);
        if let Some(step) = self.steps.get_mut(&number) {
            step.vertex.started = Some(now());
            self.messages.push(StatusResponse { vertexes: vec![step.vertex.clone()], ..StatusResponse::default() });
        }
    }

    fn hold(&mut self, number: usize, name: String) {
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(format!("{} {number} {name}", self.build))));
        self.steps.insert(number, Running { vertex: Vertex { digest, name, ..Vertex::default() }, written: 0 });
    }

    fn finish(&mut self, number: usize, failure: Option<&str>) {
        let Some(mut step) = self.steps.remove(&number) else { return };
        if step.vertex.started.is_none() {
            let Some(_) = failure else { return };
            step.vertex.started = Some(now());
        }
        step.vertex.completed = Some(now());
        step.vertex.error = failure.unwrap_or_default().to_owned();
        self.messages.push(StatusResponse { vertexes: vec![step.vertex], ..StatusResponse::default() });
    }

    fn write(&mut self, number: usize, source: LogSource, mut bytes: Vec<u8>) {
        let Some(step) = self.steps.get_mut(&number).filter(|step| step.written <= LOG_LEN_MAX) else { return };
        step.written += bytes.len();
        if step.written > LOG_LEN_MAX {
            bytes = format!("\n[output clipped: a step's first {LOG_LEN_MAX} bytes are kept]\n").into_bytes();
        }
        let stream = match source {
            LogSource::Stdout => 1,
            LogSource::Stderr => 2,
        };
        let log = VertexLog { vertex: step.vertex.digest.clone(), timestamp: Some(now()), stream, msg: bytes };
        self.messages.push(StatusResponse { logs: vec![log], ..StatusResponse::default() });
    }
}

/// `[stage 2/5] RUN make`
fn name(step: &BuildStep) -> String {
    let place = step.place.map(|(number, of)| format!("{number}/{of}")).unwrap_or_default();
    let stage = [step.stage.as_str(), &place].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
    if stage.is_empty() { step.text.clone() } else { format!("[{stage}] {}", step.text) }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(number: usize, text: &str, place: Option<(usize, usize)>) -> BuildOutput {
        BuildOutput::Started(BuildStep { number, of: 3, text: text.into(), stage: "a".into(), place })
    }

    #[tokio::test]
    async fn steps_are_told_of_from_the_beginning() {
        let progress = Progress::new("build");
        progress.tell(step(1, "FROM x", Some((1, 2))));
        progress.tell(BuildOutput::Ended(1, "key".into()));
        progress.tell(step(2, "ENV a=b", None));
        progress.tell(BuildOutput::Ended(2, "key".into()));
        progress.tell(step(3, "RUN y", Some((2, 2))));
        progress.tell(BuildOutput::Written(3, LogSource::Stderr, b"out".to_vec()));
        progress.tell(BuildOutput::Written(3, LogSource::Stdout, vec![0; LOG_LEN_MAX]));
        progress.tell(BuildOutput::Written(3, LogSource::Stdout, b"more".to_vec()));
        progress.tell(BuildOutput::Failed(3, "no".into()));
        progress.end();
        let mut told = Vec::new();
        while let Some(message) = progress.next(told.len()).await {
            told.push(message);
        }
        let vertexes: Vec<_> = told.iter().flat_map(|message| &message.vertexes).collect();
        let shown: Vec<_> =
            vertexes.iter().map(|v| (v.name.as_str(), v.completed.is_some(), v.error.as_str())).collect();
        let run = "[a 2/2] RUN y";
        assert_eq!(
            shown,
            [("[a 1/2] FROM x", false, ""), ("[a 1/2] FROM x", true, ""), (run, false, ""), (run, true, "no")]
        );
        let logs: Vec<_> = told.iter().flat_map(|message| &message.logs).collect();
        assert_eq!((logs.len(), logs[0].stream, logs[0].msg.as_slice()), (2, 2, b"out".as_slice()));
        assert!(logs[1].msg.starts_with(b"\n[output clipped"));
        assert_eq!(logs[0].vertex, vertexes[3].digest);
    }
}
