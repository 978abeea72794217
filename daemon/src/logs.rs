//! Output as the Engine API streams it: frames of an eight-byte header and a piece of output,
//! merged from the nodes where the tasks ran.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_TYPE;
use axum::response::Response;
use serde::Deserialize;
use skep_api::{ServiceId, Task, TaskId, TaskState, Timestamp};
use skep_engine::{LogLine, LogSource, LogStream, log_attributes};
use skep_manager::Manager;
use skep_raft_store::Tables;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

use crate::bulk::{LogQuery, find_container};
use crate::daemon::Daemon;
use crate::http::ApiError;

const FRAMES_AHEAD: usize = 256;

/// The query of a request for output.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct LogParams {
    follow: String,
    stdout: String,
    stderr: String,
    since: String,
    until: String,
    timestamps: String,
    details: String,
    tail: String,
    /// Whether lines go without frames.
    #[serde(skip)]
    raw: bool,
}

fn on(text: &str) -> bool {
    matches!(text, "1" | "true" | "True")
}

impl LogParams {
    pub(crate) fn follows(&self) -> bool {
        on(&self.follow)
    }

    pub(crate) fn query(&self) -> Result<LogQuery, ApiError> {
        if !on(&self.stdout) && !on(&self.stderr) {
            return Err(ApiError::bad_request("Bad parameters: you must choose at least one stream, stdout or stderr"));
        }
        let time = |name: &str, text: &str| match text {
            "" | "0" => Ok(None),
            text => Timestamp::parse(text)
                .map(Some)
                .ok_or_else(|| ApiError::bad_request(format!("{name}={text:?} is no time: use RFC 3339 or seconds"))),
        };
        let tail = match self.tail.as_str() {
            "" | "all" => None,
            // As docker has it: all.
            text if text.parse::<i64>().is_ok_and(|lines| lines < 0) => None,
            text => Some(text.parse().map_err(|_| ApiError::bad_request(format!("tail={text:?} is no number")))?),
        };
        Ok(LogQuery {
            stdout: on(&self.stdout),
            stderr: on(&self.stderr),
            since: time("since", &self.since)?,
            until: time("until", &self.until)?,
            tail,
            follow: self.follows(),
        })
    }

    /// One line as a frame. `details` stand in front of the text, the time in front of them.
    pub(crate) fn frame(&self, line: &LogLine, details: &str) -> Bytes {
        let mut text = String::new();
        if on(&self.timestamps) {
            text = format!("{} ", line.time);
        }
        if on(&self.details) {
            text = format!("{text}{details} ");
        }
        text.push_str(&line.text);
        if self.raw { text.into() } else { stream_frame(line.stream, text.as_bytes()) }
    }

    /// Takes frames off: a terminal's output goes as it is.
    pub(crate) fn raw(mut self, raw: bool) -> Self {
        self.raw = raw;
        self
    }
}

/// A piece of output as the Engine API multiplexes it.
pub(crate) fn stream_frame(source: LogSource, bytes: &[u8]) -> Bytes {
    let stream = match source {
        LogSource::Stdout => 1,
        LogSource::Stderr => 2,
    };
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes();
    [[stream, 0, 0, 0].as_slice(), &len, bytes].concat().into()
}

/// Streams one container's output.
pub(crate) fn container_logs(mut lines: LogStream, params: LogParams, details: String) -> Response {
    let (frames, stream) = mpsc::channel(FRAMES_AHEAD);
    let raw = params.raw;
    tokio::spawn(async move {
        while let Some(line) = lines.recv().await {
            if frames.send(params.frame(&line, &details)).await.is_err() {
                return;
            }
        }
    });
    response(stream, raw)
}

fn response(frames: mpsc::Receiver<Bytes>, raw: bool) -> Response {
    let body = ReceiverStream::new(frames).map(Ok::<_, std::convert::Infallible>);
    let mut response = Response::new(Body::from_stream(body));
    let kind = axum::http::HeaderValue::from_static(if raw {
        "application/vnd.docker.raw-stream"
    } else {
        "application/vnd.docker.multiplexed-stream"
    });
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// Streams the output of tasks, wherever they ran. A node that cannot be reached is told on
/// standard error; the others' output is complete. `more` adds tasks that a service gets later.
pub(crate) async fn task_logs(
    daemon: &Arc<Daemon>,
    tables: &Tables,
    tasks: Vec<Arc<Task>>,
    params: &LogParams,
    more: Option<(Manager, ServiceId)>,
) -> Result<Response, ApiError> {
    let query = params.query()?;
    let node = daemon.swarm.node().await?;
    // Of terminals alone there is one stream.
    let raw = !tasks.is_empty() && tasks.iter().all(|task| task.spec.container.tty);
    let relay = Relay { daemon: daemon.clone(), params: params.clone().raw(raw), query, own: node.id() };
    let (frames, stream) = mpsc::channel(FRAMES_AHEAD);
    let mut known = BTreeSet::new();
    for task in tasks {
        known.insert(task.id);
        tokio::spawn(relay.clone().one(tables.clone(), task, frames.clone()));
    }
    if let Some((manager, service)) = more {
        tokio::spawn(relay.follow_service(manager, service, known, frames));
    }
    Ok(response(stream, raw))
}

/// Brings the output of tasks to one client.
#[derive(Clone)]
struct Relay {
    daemon: Arc<Daemon>,
    params: LogParams,
    query: LogQuery,
    own: skep_api::NodeId,
}

impl Relay {
    async fn one(self, tables: Tables, task: Arc<Task>, frames: mpsc::Sender<Bytes>) {
        let Some(node_id) = task.node_id.filter(|_| task.status.state >= TaskState::Preparing) else { return };
        let options = task.log_driver().map(|driver| &driver.options).cloned().unwrap_or_default();
        let mut details = log_attributes(&options, &task.spec.container.labels, &task.spec.container.env);
        details.insert("com.docker.swarm.node.id".into(), node_id.to_string());
        details.insert("com.docker.swarm.service.id".into(), task.service_id.to_string());
        details.insert("com.docker.swarm.task.id".into(), task.id.to_string());
        let details: Vec<_> = details.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let details = details.join(",");
        let mut lines = match self.open(&tables, &task, node_id).await {
            Ok(lines) => lines,
            Err(error) => {
                let text =
                    format!("warning: incomplete log stream: task {} on node {node_id}: {error:#}\n", task.slot_name());
                let line = LogLine { text, stream: LogSource::Stderr, time: Timestamp::NEVER };
                drop(frames.send(self.params.frame(&line, &details)).await);
                return;
            }
        };
        while let Some(line) = lines.recv().await {
            if frames.send(self.params.frame(&line, &details)).await.is_err() {
                return;
            }
        }
    }

    async fn open(&self, tables: &Tables, task: &Task, node_id: skep_api::NodeId) -> anyhow::Result<LogStream> {
        if node_id == self.own {
            let container = find_container(&self.daemon.engine, task.id);
            let container = container.ok_or_else(|| anyhow::anyhow!("its container is gone"))?;
            return Ok(self.daemon.engine.logs(&container, self.query.options())?);
        }
        let node = tables.nodes.get(node_id).ok_or_else(|| anyhow::anyhow!("the node left the swarm"))?;
        let own = self.daemon.swarm.node().await?;
        own.bulk().task_logs(node, task.id, self.query.clone()).await
    }

    /// Adds each new task of the service until the client goes.
    async fn follow_service(
        self,
        manager: Manager,
        service: ServiceId,
        mut known: BTreeSet<TaskId>,
        frames: mpsc::Sender<Bytes>,
    ) {
        let mut commits = manager.store().watch();
        loop {
            tokio::select! {
                () = frames.closed() => return,
                commit = commits.recv() => {
                    if let Err(tokio::sync::broadcast::error::RecvError::Closed) = commit {
                        return;
                    }
                }
            }
            let tables = manager.view();
            if tables.services.get(service).is_none_or(|service| service.removed) {
                return;
            }
            let started: Vec<_> = tables
                .tasks_of_service(service)
                .filter(|task| task.status.state >= TaskState::Running && !known.contains(&task.id))
                .cloned()
                .collect();
            for task in started {
                known.insert(task.id);
                tokio::spawn(self.clone().one((*tables).clone(), task, frames.clone()));
            }
        }
    }
}
