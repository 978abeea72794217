//! `skep stats`: what containers use.

use std::io::IsTerminal as _;

use futures::future::join_all;
use serde_json::{Value, json};

use crate::client::{Client, escape};
use crate::output::ListArgs;

#[derive(clap::Args)]
pub(crate) struct StatsArgs {
    /// Those that do not run, too
    #[arg(short, long)]
    all: bool,
    /// Look once
    #[arg(long)]
    no_stream: bool,
    /// Show ids in full
    #[arg(long)]
    no_trunc: bool,
    #[command(flatten)]
    list: ListArgs,
    /// [default: those that run]
    containers: Vec<String>,
}

pub(crate) async fn stats(client: &Client, args: &StatsArgs) -> anyhow::Result<()> {
    loop {
        let names = if args.containers.is_empty() { all(client, args.all).await? } else { args.containers.clone() };
        // Each looks twice, a second apart, to tell what part of the CPUs is used.
        let looks = names.iter().map(|name| look(client, name, args.no_trunc));
        let rows: anyhow::Result<Vec<Value>> = join_all(looks).await.into_iter().collect();
        let rows = match rows {
            // One of a list that we made ourselves may be gone by now.
            Err(_) if args.containers.is_empty() && !args.no_stream => continue,
            other => other?,
        };
        if !args.no_stream && std::io::stdout().is_terminal() {
            console::Term::stdout().clear_screen()?;
        }
        let columns = [
            ("ID", "CONTAINER ID"),
            ("Name", "NAME"),
            ("CPUPerc", "CPU %"),
            ("MemUsage", "MEM USAGE / LIMIT"),
            ("MemPerc", "MEM %"),
            ("NetIO", "NET I/O"),
            ("BlockIO", "BLOCK I/O"),
            ("PIDs", "PIDS"),
        ];
        args.list.print(&columns, &rows)?;
        if args.no_stream {
            return Ok(());
        }
        if names.is_empty() {
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
    }
}

async fn all(client: &Client, all: bool) -> anyhow::Result<Vec<String>> {
    let found = client.get(&format!("/containers/json?all={all}")).await?;
    let ids = found.as_array().into_iter().flatten().filter_map(|container| container["Id"].as_str());
    Ok(ids.map(str::to_owned).collect())
}

async fn look(client: &Client, name: &str, no_trunc: bool) -> anyhow::Result<Value> {
    let seen = client.get(&format!("/containers/{}/stats?stream=false", escape(name))).await?;
    Ok(row(&seen, no_trunc))
}

fn row(seen: &Value, no_trunc: bool) -> Value {
    let number = |pointer: &str| seen.pointer(pointer).and_then(Value::as_f64).unwrap_or(0.0);
    let id = seen["id"].as_str().unwrap_or_default();
    let used_cpu = number("/cpu_stats/cpu_usage/total_usage") - number("/precpu_stats/cpu_usage/total_usage");
    let passed = number("/cpu_stats/system_cpu_usage") - number("/precpu_stats/system_cpu_usage");
    let cpu = if passed > 0.0 { used_cpu / passed * number("/cpu_stats/online_cpus") * 100.0 } else { 0.0 };
    // What the kernel only keeps for later is not counted.
    let cache = number("/memory_stats/stats/total_inactive_file").max(number("/memory_stats/stats/inactive_file"));
    let (used, limit) = ((number("/memory_stats/usage") - cache).max(0.0), number("/memory_stats/limit"));
    let networks = seen["networks"].as_object().into_iter().flatten();
    let (received, sent) = networks.fold((0.0, 0.0), |(received, sent), (_, link)| {
        let bytes = |key: &str| link[key].as_f64().unwrap_or(0.0);
        (received + bytes("rx_bytes"), sent + bytes("tx_bytes"))
    });
    let transfers = seen["blkio_stats"]["io_service_bytes_recursive"].as_array().into_iter().flatten();
    let (read, written) = transfers.fold((0.0, 0.0), |(read, written), entry| {
        let bytes = entry["value"].as_f64().unwrap_or(0.0);
        match entry["op"].as_str().map(str::to_ascii_lowercase).as_deref() {
            Some("read") => (read + bytes, written),
            Some("write") => (read, written + bytes),
            _ => (read, written),
        }
    });
    json!({
        "ID": if no_trunc { id } else { &id[..id.len().min(12)] },
        "Name": seen["name"].as_str().unwrap_or_default().trim_start_matches('/'),
        "Container": id, "CPUPerc": format!("{cpu:.2}%"),
        "MemUsage": format!("{} / {}", bytes(used), bytes(limit)),
        "MemPerc": format!("{:.2}%", if limit > 0.0 { used / limit * 100.0 } else { 0.0 }),
        "NetIO": format!("{} / {}", bytes(received), bytes(sent)),
        "BlockIO": format!("{} / {}", bytes(read), bytes(written)),
        "PIDs": number("/pids_stats/current"),
    })
}

/// `1.5MiB`
pub(crate) fn bytes(count: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut count = count;
    for unit in &units[..4] {
        if count < 1024.0 {
            return if *unit == "B" { format!("{count:.0}B") } else { format!("{count:.1}{unit}") };
        }
        count /= 1024.0;
    }
    format!("{count:.1}{}", units[4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_taken_of_what_passed_between_two_looks() {
        let seen = json!({
            "id": "0123456789abcdef", "name": "/web",
            "cpu_stats": {"cpu_usage": {"total_usage": 300}, "system_cpu_usage": 2000, "online_cpus": 2},
            "precpu_stats": {"cpu_usage": {"total_usage": 100}, "system_cpu_usage": 1000},
            "memory_stats": {"usage": 3_145_728, "limit": 4_194_304, "stats": {"total_inactive_file": 1_048_576}},
            "networks": {"eth0": {"rx_bytes": 1000, "tx_bytes": 1}, "eth1": {"rx_bytes": 48, "tx_bytes": 1}},
        });
        let row = row(&seen, false);
        for (key, want) in [
            ("ID", "0123456789ab"),
            ("Name", "web"),
            ("CPUPerc", "40.00%"),
            ("MemUsage", "2.0MiB / 4.0MiB"),
            ("MemPerc", "50.00%"),
            ("NetIO", "1.0KiB / 2B"),
        ] {
            assert_eq!(row[key], want, "{key}");
        }
    }
}
