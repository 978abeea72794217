//! What of a request is refused before a container is made, in words that name the next step. Clients look for the
//! first half of many of them.

use std::ops::RangeInclusive;

use skep_api::container::HealthConfig;

use super::create::{CreateBody, Resources};
use crate::http::ApiError;

/// As the kernel takes it.
const OOM_SCORES: RangeInclusive<i64> = -1000..=1000;
const CPU_SHARES: RangeInclusive<i64> = 2..=262_144;
const CPU_PERIOD_MICROS: RangeInclusive<i64> = 1000..=1_000_000;
const CPU_QUOTA_MICROS_MIN: i64 = 1000;
const MEMORY_MIN: i64 = 6 << 20;
/// The shortest time that a health check may name.
const HEALTH_NANOS_MIN: i64 = 1_000_000;

const HOST_LINKS: &str = "host type networking can't be used with links. This would result in undefined behavior";
const OTHERS_LINKS: &str = "container type network can't be used with links. This would result in undefined behavior";

/// By the kernel's numbers, without `CAP_`.
const CAPABILITY_PREFIX: &str = "CAP_";

impl CreateBody {
    /// What contradicts itself, or cannot be.
    pub(super) fn check(&self) -> Result<(), ApiError> {
        let host = &self.host_config;
        if !self.working_dir.is_empty() && !self.working_dir.starts_with('/') {
            let dir = &self.working_dir;
            return refuse(format!("the working directory {dir:?} is invalid: it needs to be an absolute path"));
        }
        if let Some(var) = self.env.iter().find(|var| var.is_empty() || var.starts_with('=')) {
            return refuse(format!("invalid environment variable: {var}; write NAME=VALUE"));
        }
        if !OOM_SCORES.contains(&host.oom_score_adj) {
            return refuse(format!("Invalid value {}, range for oom score adj is [-1000, 1000].", host.oom_score_adj));
        }
        if host.shm_size < 0 {
            return refuse("SHM size can not be less than 0");
        }
        for name in host.cap_add.iter().chain(&host.cap_drop) {
            let bare = name.to_ascii_uppercase();
            let bare = bare.strip_prefix(CAPABILITY_PREFIX).unwrap_or(&bare);
            if bare != "ALL" && !skep_engine::is_capability(bare) {
                return refuse(format!("invalid capability: {name:?}: use names such as NET_ADMIN, or ALL"));
            }
        }
        if host.annotations.contains_key("") {
            return refuse("invalid Annotations: the empty string is not permitted as an annotation key");
        }
        self.healthcheck.as_ref().map_or(Ok(()), check_health)?;
        self.check_networks()
    }

    /// What does not go with the network, or the host name, of somebody else.
    fn check_networks(&self) -> Result<(), ApiError> {
        let host = &self.host_config;
        let (others, hosts) = (host.network_mode.starts_with("container:"), host.network_mode == "host");
        let published = !host.port_bindings.is_empty() || host.publish_all_ports;
        let conflicts = [
            (host.uts_mode == "host" && !self.hostname.is_empty(), "hostname and the UTS mode"),
            (others && !self.hostname.is_empty(), "hostname and the network mode"),
            (hosts && !host.links.is_empty(), HOST_LINKS),
            (others && !host.links.is_empty(), OTHERS_LINKS),
            (others && !host.dns.is_empty(), "dns and the network mode"),
            (others && !host.extra_hosts.is_empty(), "custom host-to-IP mapping and the network mode"),
            ((others || hosts) && !self.mac_address.is_empty(), "mac-address and the network mode"),
            (others && published, "port publishing and the container type network mode"),
            (others && !self.exposed_ports.is_empty(), "port exposing and the container type network mode"),
        ];
        match conflicts.into_iter().find(|(conflict, _)| *conflict) {
            Some((_, what)) => refuse(format!("conflicting options: {what}")),
            None => Ok(()),
        }
    }
}

fn check_health(check: &HealthConfig) -> Result<(), ApiError> {
    let times = [
        ("Interval", check.interval),
        ("Timeout", check.timeout),
        ("StartPeriod", check.start_period),
        ("StartInterval", check.start_interval),
    ];
    if let Some((name, _)) = times.iter().find(|(_, time)| time.0 != 0 && time.0 < HEALTH_NANOS_MIN) {
        return refuse(format!("{name} in Healthcheck cannot be less than 1ms"));
    }
    if check.retries < 0 {
        return refuse("Retries in Healthcheck cannot be negative");
    }
    Ok(())
}

impl Resources {
    pub(super) fn check(&self) -> Result<(), ApiError> {
        self.check_memory()?;
        self.check_cpus()?;
        if self.blkio_weight != 0 && !(10..=1000).contains(&self.blkio_weight) {
            return refuse("range of blkio weight is from 10 to 1000");
        }
        Ok(())
    }

    fn check_memory(&self) -> Result<(), ApiError> {
        if self.memory != 0 && self.memory < MEMORY_MIN {
            return refuse("Minimum memory limit allowed is 6MB: give more, or 0 for no limit");
        }
        if self.memory_swap > 0 && self.memory_swap < self.memory {
            return refuse("Minimum memoryswap limit should be larger than memory limit, see usage");
        }
        if self.memory_reservation != 0 && self.memory_reservation < MEMORY_MIN {
            return refuse("Minimum memory reservation allowed is 6MB: give more, or 0 for none");
        }
        if self.memory > 0 && self.memory_reservation > self.memory {
            return refuse("Minimum memory limit can not be less than memory reservation limit, see usage");
        }
        if self.memory_swappiness.is_some_and(|value| !(-1..=100).contains(&value)) {
            return refuse("invalid memory swappiness: the valid range is 0-100");
        }
        Ok(())
    }

    fn check_cpus(&self) -> Result<(), ApiError> {
        if self.nano_cpus < 0 {
            return refuse("the number of CPUs is negative: give 0 for no limit, or more");
        }
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        if self.nano_cpus > i64::try_from(cpus).unwrap_or(1) * 1_000_000_000 {
            return refuse(format!("range of CPUs is from 0.01 to {cpus}.00, as there are only {cpus} CPUs available"));
        }
        for (given, what) in [(self.cpu_period > 0, "CPU Period"), (self.cpu_quota > 0, "CPU Quota")] {
            if self.nano_cpus > 0 && given {
                return refuse(format!("Conflicting options: Nano CPUs and {what} cannot both be set"));
            }
        }
        if self.cpu_shares != 0 && !CPU_SHARES.contains(&self.cpu_shares) {
            let (least, most) = (CPU_SHARES.start(), CPU_SHARES.end());
            return refuse(if self.cpu_shares < *least {
                format!("The minimum allowed cpu-shares is {least}")
            } else {
                format!("The maximum allowed cpu-shares is {most}")
            });
        }
        if self.cpu_period != 0 && !CPU_PERIOD_MICROS.contains(&self.cpu_period) {
            return refuse("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)");
        }
        if self.cpu_quota > 0 && self.cpu_quota < CPU_QUOTA_MICROS_MIN {
            return refuse("CPU cfs quota can not be less than 1ms (i.e. 1000)");
        }
        check_set("cpus", &self.cpuset_cpus, "Cpus_allowed_list:", "CPUs")?;
        check_set("mems", &self.cpuset_mems, "Mems_allowed_list:", "memory nodes")
    }
}

/// That a list such as `0-2,4` can be read, and that the host has all of it.
fn check_set(name: &str, text: &str, allowed: &str, what: &str) -> Result<(), ApiError> {
    if text.is_empty() {
        return Ok(());
    }
    let Some(wanted) = numbers(text) else {
        return refuse(format!("Invalid value {text} for cpuset {name}: write numbers and ranges such as 0-2,4"));
    };
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let available = status.lines().find_map(|line| line.strip_prefix(allowed)).unwrap_or_default().trim();
    match numbers(available) {
        Some(there) if wanted.iter().any(|number| !there.contains(number)) => {
            refuse(format!("Requested {what} are not available - requested {text}, available: {available}"))
        }
        // Without a list there is nothing to compare with; the kernel says so at the start.
        _ => Ok(()),
    }
}

/// More than any host has of either.
const NUMBERS_MAX: u32 = 8192;

fn numbers(text: &str) -> Option<std::collections::BTreeSet<u32>> {
    let mut all = std::collections::BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= NUMBERS_MAX {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

fn refuse<T>(why: impl ToString) -> Result<T, ApiError> {
    Err(ApiError::bad_request(why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(body: &str, want: &str) {
        let body: CreateBody = serde_json::from_str(body).unwrap();
        let checked = body.check().and_then(|()| body.host_config.resources.check());
        let got = checked.map_or_else(|error| format!("{error:?}"), |()| "taken".into());
        assert!(got.contains(want), "{got} should say {want}");
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        check(r#"{"Env":["A=1","B"],"HostConfig":{"CapAdd":["net_admin","CAP_SYS_TIME"],"CapDrop":["ALL"]}}"#, "taken");
        check(r#"{"Env":["=1"]}"#, "invalid environment variable");
        check(r#"{"WorkingDir":"here"}"#, "absolute");
        check(r#"{"HostConfig":{"CapDrop":["CHPASS"]}}"#, "CHPASS");
        check(r#"{"HostConfig":{"OomScoreAdj":1001}}"#, "1001");
        check(r#"{"HostConfig":{"ShmSize":-1}}"#, "SHM size");
        check(r#"{"HostConfig":{"Memory":1024}}"#, "6MB");
        check(r#"{"HostConfig":{"Memory":8000000,"MemoryReservation":9000000}}"#, "reservation");
        check(r#"{"HostConfig":{"CpuShares":1}}"#, "minimum allowed cpu-shares is 2");
        check(r#"{"HostConfig":{"CpuPeriod":900}}"#, "1ms");
        check(r#"{"HostConfig":{"NanoCpus":1000000000,"CpuQuota":5000}}"#, "Nano CPUs and CPU Quota");
        check(r#"{"HostConfig":{"CpusetCpus":"0"}}"#, "taken");
        check(r#"{"HostConfig":{"CpusetCpus":"1-42,,"}}"#, "cpuset cpus");
        check(r#"{"HostConfig":{"CpusetCpus":"8000"}}"#, "not available");
        check(r#"{"Hostname":"h","HostConfig":{"NetworkMode":"container:a"}}"#, "hostname and the network mode");
        check(r#"{"HostConfig":{"NetworkMode":"container:a","Dns":["1.1.1.1"]}}"#, "dns and the network mode");
        check(r#"{"HostConfig":{"NetworkMode":"container:a","PublishAllPorts":true}}"#, "port publishing");
        check(r#"{"Hostname":"h","HostConfig":{"UTSMode":"host"}}"#, "UTS");
    }
}
