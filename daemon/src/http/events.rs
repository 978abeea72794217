//! What happens, as it happens: on this host, and in the swarm if this node is a manager.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Query;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::Timestamp;
use skep_api::units::parse_duration;
use skep_engine::EngineEvent;
use skep_raft_store::Commit;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::{ApiError, State};
use crate::filters::Filters;
use crate::swarm::events::SwarmEvent;

const EVENTS_AHEAD: usize = 256;

#[derive(Deserialize)]
pub(super) struct EventsQuery {
    filters: Option<String>,
    since: Option<String>,
    until: Option<String>,
}

/// A time as RFC 3339 or seconds, or how long ago.
fn time(name: &str, text: Option<&str>) -> Result<Option<Timestamp>, ApiError> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    let now = Timestamp::from_system(std::time::SystemTime::now());
    let ago = parse_duration(text).and_then(|ago| i64::try_from(ago.as_nanos()).ok());
    let at = Timestamp::parse(text).or_else(|| ago.map(|ago| Timestamp::from_nanos(now.as_nanos() - ago)));
    at.map(Some).ok_or_else(|| {
        ApiError::bad_request(format!("{name}={text:?} is no time: use RFC 3339, seconds, or how long ago"))
    })
}

pub(super) async fn events(state: State, Query(query): Query<EventsQuery>) -> Result<Response, ApiError> {
    let known = [
        "type",
        "scope",
        "event",
        "container",
        "image",
        "service",
        "node",
        "secret",
        "config",
        "network",
        "label",
        "volume",
        "daemon",
    ];
    let filters = Filters::parse(query.filters.as_deref(), &known).map_err(ApiError::bad_request)?;
    let (since, until) = (time("since", query.since.as_deref())?, time("until", query.until.as_deref())?);
    if let (Some(since), Some(until)) = (since, until)
        && since > until
    {
        return Err(ApiError::bad_request(
            "`since` time cannot be after `until` time: exchange them, or leave until out to wait for what comes",
        ));
    }
    // Who only says until when wants what was before.
    let since = since.or_else(|| until.map(|_| Timestamp::from_nanos(0)));
    let (past, local) = state.engine.events(since);
    let mut past: Vec<_> = past.iter().map(|event| (event.at, local_event(event))).collect();
    let mut commits = None;
    let mut told = Timestamp::from_nanos(0);
    if let Ok(manager) = state.swarm.manager().await {
        commits = Some(manager.store().watch());
        let before = since.map(|since| state.swarm.events().since(since)).unwrap_or_default();
        told = before.iter().map(|event| event.at).max().unwrap_or(told);
        past.extend(before.iter().map(|event| (event.at, swarm_event(event))));
        past.sort_by_key(|(at, _)| *at);
    }
    let (lines, stream) = mpsc::channel::<Value>(EVENTS_AHEAD);
    let telling = Telling { past, local, commits, told, until, filters, stop: state.stop.clone() };
    tokio::spawn(telling.run(lines));
    let body = ReceiverStream::new(stream).map(|value| Ok::<_, std::convert::Infallible>(format!("{value}\n")));
    Ok(([("content-type", "application/json")], Body::from_stream(body)).into_response())
}

/// What one client is told.
struct Telling {
    past: Vec<(Timestamp, Value)>,
    local: broadcast::Receiver<EngineEvent>,
    /// None: this node is no manager.
    commits: Option<broadcast::Receiver<Arc<Commit>>>,
    /// What of the swarm is past does not come once more.
    told: Timestamp,
    until: Option<Timestamp>,
    filters: Filters,
    stop: CancellationToken,
}

impl Telling {
    async fn run(mut self, lines: mpsc::Sender<Value>) {
        let until = self.until;
        let over = async {
            match until.map(|until| until.since(Timestamp::from_system(std::time::SystemTime::now()))) {
                Some(left) => tokio::time::sleep(left).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(over);
        let past = std::mem::take(&mut self.past).into_iter();
        let past = past.filter(|(at, _)| until.is_none_or(|until| *at <= until)).map(|(_, event)| event).collect();
        if !self.tell(&lines, past).await {
            return;
        }
        loop {
            let events = tokio::select! {
                () = self.stop.cancelled() => return,
                () = lines.closed() => return,
                () = &mut over => return,
                event = self.local.recv() => match event {
                    Ok(event) => vec![local_event(&event)],
                    Err(broadcast::error::RecvError::Lagged(_)) => vec![],
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                commit = next(&mut self.commits) => {
                    let events = commit.map(|commit| SwarmEvent::of(&commit)).unwrap_or_default();
                    events.iter().filter(|event| event.at > self.told).map(swarm_event).collect()
                }
            };
            if !self.tell(&lines, events).await {
                return;
            }
        }
    }

    /// Whether the client is still there.
    async fn tell(&self, lines: &mpsc::Sender<Value>, events: Vec<Value>) -> bool {
        for event in events.into_iter().filter(|event| passes(event, &self.filters)) {
            if lines.send(event).await.is_err() {
                return false;
            }
        }
        true
    }
}

/// The next commit; never comes if this node is no manager (any more).
async fn next(commits: &mut Option<broadcast::Receiver<Arc<Commit>>>) -> Option<Arc<Commit>> {
    match commits {
        Some(receiver) => match receiver.recv().await {
            Ok(commit) => Some(commit),
            Err(broadcast::error::RecvError::Lagged(_)) => None,
            Err(broadcast::error::RecvError::Closed) => {
                *commits = None;
                None
            }
        },
        None => std::future::pending().await,
    }
}

fn event(kind: &str, action: &str, scope: &str, id: &str, attributes: Value, at: Timestamp) -> Value {
    let mut event = json!({
        "Type": kind, "Action": action, "Actor": {"ID": id, "Attributes": attributes}, "scope": scope,
        "time": at.as_nanos() / 1_000_000_000, "timeNano": at.as_nanos(),
        "status": action, "id": id,
    });
    // As it was before there was an actor.
    if kind == "container" {
        event["from"] = event["Actor"]["Attributes"]["image"].clone();
    }
    event
}

fn local_event(e: &EngineEvent) -> Value {
    event(e.kind, &e.action, "local", &e.id, json!(e.attributes), e.at)
}

fn swarm_event(e: &SwarmEvent) -> Value {
    event(e.kind, e.action, "swarm", &e.id, json!(e.attributes), e.at)
}

fn without_tag(name: &str) -> &str {
    match name.rsplit_once(':') {
        Some((bare, tag)) if !tag.contains('/') => bare,
        _ => name,
    }
}

fn passes(event: &Value, filters: &Filters) -> bool {
    let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let names = |kind: &str| {
        filters.any(kind, |wanted| {
            text("/Type") == kind && (text("/Actor/ID").starts_with(wanted) || text("/Actor/Attributes/name") == wanted)
        })
    };
    // What happens to an image, or to the containers that are made of it.
    let of_image = filters.any("image", |wanted| {
        let name = match text("/Type") {
            "image" => text("/Actor/Attributes/name"),
            "container" => text("/Actor/Attributes/image"),
            _ => return false,
        };
        let id = if text("/Type") == "image" { text("/Actor/ID") } else { "" };
        [id, name].into_iter().any(|own| !own.is_empty() && (own == wanted || without_tag(own) == without_tag(wanted)))
    });
    let labels: std::collections::BTreeMap<String, String> = event
        .pointer("/Actor/Attributes")
        .and_then(|attributes| serde_json::from_value(attributes.clone()).ok())
        .unwrap_or_default();
    let labels_match = filters.labels("label", &labels);
    filters.any("type", |kind| text("/Type") == kind)
        && filters.any("scope", |scope| text("/scope") == scope)
        && filters.any("event", |action| text("/Action").split(':').next() == Some(action))
        && labels_match
        && of_image
        && ["container", "service", "node", "secret", "config", "network", "volume", "daemon"].into_iter().all(names)
}
