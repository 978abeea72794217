//! Watches a service until it is as declared, and tells how that goes.

use std::collections::BTreeSet;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::client::{Client, escape};
use crate::output::line;

const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long nothing of a job that is not done has to be on its way before it is taken for given up.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(2);
const STABLE_DEFAULT: Duration = Duration::from_secs(5);

/// Waits until all tasks of the service run and have done so for the monitor time, or until the job is done;
/// or until its update has paused or was rolled back, or nothing of the job is tried again, which is an error.
pub(crate) async fn wait(client: &Client, service: &str, quiet: bool) -> anyhow::Result<()> {
    let bar = if quiet || !std::io::stderr().is_terminal() { ProgressBar::hidden() } else { ProgressBar::new(1) };
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} running {wide_msg}")?);
    let mut stable_since: Option<Instant> = None;
    let mut told = String::new();
    loop {
        let seen = look(client, service).await?;
        if let Some(failure) = seen.failure {
            bar.abandon();
            anyhow::bail!("{failure}");
        }
        bar.set_length(seen.desired);
        bar.set_position(seen.running);
        bar.set_message(seen.trouble.clone());
        let news = !seen.trouble.is_empty() && seen.trouble != told;
        if news && bar.is_hidden() && !quiet {
            eprintln!("{}", seen.trouble);
        }
        if news {
            told = seen.trouble;
        }
        if seen.settled {
            let since = *stable_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= seen.monitor {
                bar.finish_and_clear();
                anyhow::ensure!(seen.undone.is_empty(), "{}", seen.undone);
                let done =
                    if seen.is_job { "job complete".into() } else { format!("verify: Service {service} converged") };
                return if quiet { Ok(()) } else { line(&done) };
            }
        } else {
            stable_since = None;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

struct Seen {
    is_job: bool,
    /// Or have done their part.
    running: u64,
    desired: u64,
    /// Nothing is on its way.
    settled: bool,
    /// How long it must stay so.
    monitor: Duration,
    /// Why a job that is settled is not done; empty if it is.
    undone: String,
    trouble: String,
    failure: Option<String>,
}

async fn look(client: &Client, service: &str) -> anyhow::Result<Seen> {
    let found = client.get(&format!("/services/{service}")).await?;
    if found.get("JobStatus").is_some() {
        return look_at_job(client, service, &found).await;
    }
    let filters = json!({"service": [service], "desired-state": ["running", "accepted"]}).to_string();
    let tasks = client.get(&format!("/tasks?filters={}", escape(&filters))).await?;
    let tasks: Vec<&Value> = tasks.as_array().into_iter().flatten().collect();
    let up_to_date = |task: &&&Value| {
        task["Spec"]["ContainerSpec"] == found["Spec"]["TaskTemplate"]["ContainerSpec"]
            && task["Spec"]["ForceUpdate"] == found["Spec"]["TaskTemplate"]["ForceUpdate"]
    };
    let current: Vec<_> = tasks.iter().filter(up_to_date).collect();
    let running = current.iter().filter(|task| task["Status"]["State"] == "running").count() as u64;
    let desired = found["Spec"]["Mode"]["Replicated"]["Replicas"].as_u64().unwrap_or(tasks.len() as u64);
    let update = &found["UpdateStatus"];
    let state = update["State"].as_str().unwrap_or_default();
    let message = update["Message"].as_str().unwrap_or_default();
    let failure = match state {
        "paused" | "rollback_paused" => Some(format!("service {service}: {message}")),
        "rollback_completed" if message != "rollback completed" => Some(format!("service {service} was rolled back")),
        _ => None,
    };
    let trouble = current.iter().find_map(|task| task["Status"]["Err"].as_str()).unwrap_or_default().to_owned();
    let monitor = found["Spec"]["UpdateConfig"]["Monitor"].as_u64().map_or(STABLE_DEFAULT, Duration::from_nanos);
    Ok(Seen {
        is_job: false,
        undone: String::new(),
        running,
        desired,
        settled: running == desired
            && current.len() == tasks.len()
            && state != "updating"
            && state != "rollback_started",
        monitor,
        trouble,
        failure,
    })
}

async fn look_at_job(client: &Client, service: &str, found: &Value) -> anyhow::Result<Seen> {
    let filters = json!({"service": [service]}).to_string();
    let tasks = client.get(&format!("/tasks?filters={}", escape(&filters))).await?;
    let tasks = tasks.as_array().into_iter().flatten();
    let current: Vec<_> = tasks.filter(|task| task["JobIteration"] == found["JobStatus"]["JobIteration"]).collect();
    let wanted: Vec<_> = current.iter().filter(|task| task["DesiredState"] != "shutdown").collect();
    let done = wanted.iter().filter(|task| task["Status"]["State"] == "complete").count() as u64;
    let total = found["Spec"]["Mode"]["ReplicatedJob"]["TotalCompletions"].as_u64();
    let nodes: BTreeSet<_> = current.iter().map(|task| task["NodeID"].as_str()).collect();
    let desired = total.unwrap_or(nodes.len() as u64);
    let error = |task: &&Value| task["Status"]["Err"].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    let complete = done == desired && (total.is_some() || !nodes.is_empty());
    let why = current.iter().find_map(error).unwrap_or_default();
    let undone = format!("job {service}: {done} of its tasks ended well, and the others are not tried again: {why}");
    Ok(Seen {
        is_job: true,
        running: done,
        desired,
        settled: complete || (!current.is_empty() && wanted.len() as u64 == done),
        monitor: if complete { Duration::ZERO } else { GIVEN_UP_AFTER },
        undone: if complete { String::new() } else { undone },
        trouble: wanted.iter().find_map(|task| error(task)).unwrap_or_default(),
        failure: None,
    })
}
