//! Watches a service until it is as declared, and tells how that goes.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::client::{Client, escape};
use crate::output::line;

const LOOK_EVERY: Duration = Duration::from_millis(50);
const STABLE_DEFAULT: Duration = Duration::from_secs(5);

/// Waits until all tasks of the service run and have done so for the monitor time; or until its
/// update has paused or was rolled back, which is an error.
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
                return if quiet { Ok(()) } else { line(&format!("verify: Service {service} converged")) };
            }
        } else {
            stable_since = None;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

struct Seen {
    running: u64,
    desired: u64,
    settled: bool,
    monitor: Duration,
    trouble: String,
    failure: Option<String>,
}

async fn look(client: &Client, service: &str) -> anyhow::Result<Seen> {
    let found = client.get(&format!("/services/{service}")).await?;
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
