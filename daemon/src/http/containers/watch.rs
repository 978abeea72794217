//! What containers do and use: their processes, and what these cost.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::Timestamp;
use skep_engine::{BlockCount, ContainerState, Engine, Usage};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

use crate::http::{ApiError, State};
use crate::swarm::memory_total;

#[derive(Deserialize)]
pub(in crate::http) struct TopQuery {
    ps_args: Option<String>,
}

/// The processes of a container, as `ps` on the host shows them.
pub(in crate::http) async fn top(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<TopQuery>,
) -> Result<Json<Value>, ApiError> {
    let args = query.ps_args.filter(|args| !args.is_empty()).unwrap_or_else(|| "-ef".into());
    let args: Vec<String> = args.split_whitespace().map(str::to_owned).collect();
    // Options that make ps write something else than a table of processes.
    if args.iter().any(|arg| arg.contains('h') && !arg.starts_with('-')) {
        return Err(ApiError::bad_request("ps without a header cannot be read: leave the option h out"));
    }
    let pids = state.engine.processes(&id)?;
    let output = tokio::process::Command::new("ps").args(&args).output().await;
    let table = match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(ApiError::bad_request(format!("ps {}: {}", args.join(" "), said.trim())));
        }
        // A host without ps: the usual columns are known without it.
        Err(_) => return Ok(Json(own_table(&pids))),
    };
    let mut lines = table.lines();
    let titles: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
    let Some(pid_at) = titles.iter().position(|&title| title == "PID") else {
        return Err(ApiError::bad_request("Couldn't find PID field in ps output: let ps show it"));
    };
    let row = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let pid: i32 = words.get(pid_at)?.parse().ok()?;
        let (first, last) = words.split_at(words.len().min(titles.len() - 1));
        let row = first.iter().map(|&word| word.to_owned()).chain([last.join(" ")]).collect::<Vec<_>>();
        pids.contains(&pid).then_some(row)
    };
    let rows: Vec<_> = lines.filter_map(row).collect();
    Ok(Json(json!({"Titles": titles, "Processes": rows})))
}

fn own_table(pids: &[i32]) -> Value {
    let row = |&pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next().map(str::to_owned)
        };
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        Some(vec![field("Uid:")?, pid.to_string(), field("PPid:")?, command.trim().to_owned()])
    };
    let rows: Vec<_> = pids.iter().filter_map(row).collect();
    json!({"Titles": ["UID", "PID", "PPID", "CMD"], "Processes": rows})
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[derive(Default)]
pub(in crate::http) struct StatsQuery {
    stream: String,
    one_shot: String,
}

const STATS_PERIOD: Duration = Duration::from_secs(1);

/// What a container uses, once or every second.
pub(in crate::http) async fn stats(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<StatsQuery>,
) -> Result<Response, ApiError> {
    let id = state.engine.inspect(&id)?.id;
    let off = |text: &str| matches!(text, "0" | "false" | "False");
    let on = |text: &str| matches!(text, "1" | "true" | "True");
    if off(&query.stream) {
        let mut sample = Sample::take(&state.engine, &id)?;
        let mut before = None;
        if !on(&query.one_shot) && sample.is_running() {
            tokio::time::sleep(STATS_PERIOD).await;
            before = Some(std::mem::replace(&mut sample, Sample::take(&state.engine, &id)?));
        }
        return Ok(Json(sample.json(before.as_ref())).into_response());
    }
    let (lines, stream) = mpsc::channel::<String>(1);
    let (engine, stop) = (state.engine.clone(), state.stop.clone());
    tokio::spawn(async move {
        let mut before = None;
        while let Ok(sample) = Sample::take(&engine, &id) {
            if lines.send(format!("{}\n", sample.json(before.as_ref()))).await.is_err() {
                return;
            }
            before = Some(sample);
            tokio::select! {
                () = stop.cancelled() => return,
                () = lines.closed() => return,
                () = tokio::time::sleep(STATS_PERIOD) => {}
            }
        }
    });
    let body = ReceiverStream::new(stream).map(Ok::<_, std::convert::Infallible>);
    Ok(([("content-type", "application/json")], Body::from_stream(body)).into_response())
}

struct Sample {
    id: String,
    name: String,
    at: Timestamp,
    /// None: it does not run.
    usage: Option<Usage>,
    memory_limit: u64,
    networks: Value,
    host_cpu_nanos: u64,
}

impl Sample {
    fn take(engine: &Engine, id: &str) -> Result<Self, ApiError> {
        let container = engine.inspect(id)?;
        let pid = match &container.state {
            ContainerState::Running(running) => Some(running.pid),
            ContainerState::Created | ContainerState::Restarting(_) | ContainerState::Exited(_) => None,
        };
        let limit = u64::try_from(container.config.limits.memory_bytes).ok().filter(|&limit| limit > 0);
        Ok(Self {
            at: Timestamp::from_system(std::time::SystemTime::now()),
            // It may end between the two looks at it.
            usage: pid.and_then(|_| engine.usage(id).ok()),
            memory_limit: limit.unwrap_or_else(|| u64::try_from(memory_total()).unwrap_or(0)),
            networks: pid.map_or(Value::Null, networks),
            host_cpu_nanos: host_cpu_nanos(),
            id: container.id,
            name: container.config.name.clone(),
        })
    }

    fn is_running(&self) -> bool {
        self.usage.is_some()
    }

    fn json(&self, before: Option<&Self>) -> Value {
        let Some(usage) = &self.usage else {
            return json!({"id": self.id, "name": format!("/{}", self.name), "read": Timestamp::NEVER,
                "preread": Timestamp::NEVER, "pids_stats": {}, "blkio_stats": {}, "num_procs": 0, "storage_stats": {},
                "cpu_stats": {"cpu_usage": {"total_usage": 0}}, "precpu_stats": {"cpu_usage": {"total_usage": 0}},
                "memory_stats": {}});
        };
        let blocks = |list: &[BlockCount]| {
            let entry = |count: &BlockCount| json!({"major": count.major, "minor": count.minor, "op": count.operation, "value": count.value});
            list.iter().map(entry).collect::<Vec<_>>()
        };
        json!({
            "id": self.id, "name": format!("/{}", self.name), "read": self.at,
            "preread": before.map_or(Timestamp::NEVER, |before| before.at),
            "pids_stats": {"current": usage.pids, "limit": usage.pids_limit},
            "blkio_stats": {"io_service_bytes_recursive": blocks(&usage.io_bytes),
                "io_serviced_recursive": blocks(&usage.io_operations)},
            "num_procs": 0, "storage_stats": {},
            "cpu_stats": self.cpu(), "precpu_stats": before.map_or_else(|| json!({"cpu_usage": {"total_usage": 0},
                "throttling_data": {}}), Self::cpu),
            "memory_stats": {"usage": usage.memory_bytes, "max_usage": usage.memory_max_bytes,
                "limit": self.memory_limit, "failcnt": usage.memory_failures, "stats": usage.memory_details},
            "networks": self.networks,
        })
    }

    fn cpu(&self) -> Value {
        let Some(usage) = &self.usage else { return json!({}) };
        json!({
            "cpu_usage": {"total_usage": usage.cpu_nanos, "usage_in_kernelmode": usage.cpu_kernel_nanos,
                "usage_in_usermode": usage.cpu_user_nanos, "percpu_usage": usage.per_cpu_nanos},
            "system_cpu_usage": self.host_cpu_nanos,
            "online_cpus": std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            "throttling_data": {"periods": usage.throttle_periods, "throttled_periods": usage.throttled_periods,
                "throttled_time": usage.throttled_nanos},
        })
    }
}

/// What has come and gone by each link that the process sees.
fn networks(pid: i32) -> Value {
    let text = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default();
    let mut links = BTreeMap::new();
    for line in text.lines().skip(2) {
        let Some((name, counts)) = line.split_once(':') else { continue };
        let counts: Vec<u64> = counts.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        if name.trim() != "lo" && counts.len() >= 12 {
            let value = json!({"rx_bytes": counts[0], "rx_packets": counts[1], "rx_errors": counts[2],
                "rx_dropped": counts[3], "tx_bytes": counts[8], "tx_packets": counts[9], "tx_errors": counts[10],
                "tx_dropped": counts[11]});
            links.insert(name.trim().to_owned(), value);
        }
    }
    if links.is_empty() { Value::Null } else { json!(links) }
}

/// The time that all of the host's processors have counted together.
fn host_cpu_nanos() -> u64 {
    const NANOS_PER_TICK: u64 = 10_000_000;
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    line.split_whitespace().skip(1).take(8).filter_map(|word| word.parse::<u64>().ok()).sum::<u64>() * NANOS_PER_TICK
}
