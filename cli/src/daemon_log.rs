//! The daemon's own log, on its standard error: as text, or a JSON object on each line.

use std::fmt;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Begins it. What sets its level from then on.
pub(crate) fn begin(level: &str, is_json: bool) -> anyhow::Result<impl Fn(&str) + use<>> {
    let (filter, handle) = tracing_subscriber::reload::Layer::new(filter(level)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let lines = if is_json { lines.event_format(JsonLine).boxed() } else { lines.boxed() };
    tracing_subscriber::registry().with(filter).with(lines).init();
    Ok(move |level: &str| {
        if let Ok(filter) = self::filter(level) {
            // The log is there as long as the program.
            let _ = handle.reload(filter);
        }
    })
}

/// What goes to the log. No environment filter: its expressions cost megabytes.
fn filter(level: &str) -> anyhow::Result<Targets> {
    let ours =
        ["skep", "skep_daemon", "skep_manager", "skep_worker", "skep_engine", "skep_overlay_net", "skep_raft_store"];
    let others = "warn,openraft=error,libcgroups=error,libcontainer=error,h2=error";
    Ok(ours.iter().fold(others.to_owned(), |all, ours| format!("{all},{ours}={level}")).parse()?)
}

/// `time`, `level` and `msg`, as dockerd calls them, and whatever else is told.
struct JsonLine;

impl<S, N> FormatEvent<S, N> for JsonLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = event.metadata().level().as_str().to_ascii_lowercase();
        let mut members = Members(Map::new());
        members.0.insert("time".into(), jiff::Timestamp::now().to_string().into());
        members.0.insert("level".into(), if level == "warn" { "warning".into() } else { level.into() });
        members.0.insert("msg".into(), "".into());
        members.0.insert("target".into(), event.metadata().target().into());
        event.record(&mut members);
        writeln!(line, "{}", Value::Object(members.0))
    }
}

struct Members(Map<String, Value>);

impl Members {
    fn put(&mut self, field: &Field, value: Value) {
        let name = if field.name() == "message" { "msg" } else { field.name() };
        self.0.insert(name.to_owned(), value);
    }
}

impl Visit for Members {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}
