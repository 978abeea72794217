//! How values of flags are read, by whichever command has them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context as _;
use serde_json::{Map, Value, json};

/// Adds to a list that may not be there yet.
pub(crate) fn push(list: &mut Value, value: Value) {
    if let Some(list) = list.as_array_mut() {
        list.push(value);
    } else {
        *list = json!([value]);
    }
}

/// Adds KEY=VALUE pairs to an object that may not be there yet.
pub(crate) fn add_pairs(map: &mut Value, pairs: &[String]) {
    for pair in pairs {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        map[key] = json!(value);
    }
}

/// KEY=VALUE pairs as an object.
pub(crate) fn members(pairs: &[String]) -> Value {
    let mut map = Value::Object(Map::new());
    add_pairs(&mut map, pairs);
    map
}

/// Nanoseconds of `1h30m`, `500ms`, `10s`.
pub(crate) fn duration(text: &str) -> anyhow::Result<i64> {
    let wrong = || anyhow::anyhow!("{text:?} is no time: write 500ms, 10s, 5m or 1h30m");
    let mut total = 0f64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit_len = rest[digits..].find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len() - digits);
        let unit = match &rest[digits..digits + unit_len] {
            "ns" => 1.0,
            "us" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return Err(wrong()),
        };
        total += number * unit;
        rest = &rest[digits + unit_len..];
    }
    if text.is_empty() {
        return Err(wrong());
    }
    #[expect(clippy::cast_possible_truncation, reason = "a time of years fits")]
    Ok(total.round() as i64)
}

pub(crate) fn size(text: &str) -> anyhow::Result<u64> {
    skep_engine::parse_size(text).with_context(|| format!("{text:?} is no size: write 512m, 2g or bytes"))
}

/// Zero if there is none.
pub(crate) fn optional_size(text: Option<&str>) -> anyhow::Result<u64> {
    text.map_or(Ok(0), size)
}

/// A command line as a shell would split it.
pub(crate) fn words(text: &str) -> anyhow::Result<Vec<String>> {
    shlex::split(text).with_context(|| format!("{text:?} has a quote that does not end"))
}

/// Variables as they are given, or as we have them; one that we do not have is left out.
pub(crate) fn environment(given: &[String]) -> Vec<String> {
    let one = |text: &String| {
        if text.contains('=') {
            return Some(text.clone());
        }
        std::env::var(text).ok().map(|value| format!("{text}={value}"))
    };
    given.iter().filter_map(one).collect()
}

/// The lines of files that hold a variable or label each.
pub(crate) fn file_lines(files: &[PathBuf]) -> anyhow::Result<Vec<String>> {
    let mut all = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        all.extend(lines.map(str::to_owned));
    }
    Ok(all)
}

/// The members of `key=value,key=value`; a key alone is true.
pub(crate) fn fields(text: &str) -> BTreeMap<&str, &str> {
    pairs(text).collect()
}

fn pairs(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split(',').map(|part| part.split_once('=').unwrap_or((part, "true")))
}

/// Reads `type=volume,source=data,target=/data,…`.
pub(crate) fn mount(text: &str) -> anyhow::Result<Value> {
    let mut mount = json!({"Type": "volume"});
    for (key, value) in pairs(text) {
        let flag = || {
            anyhow::Ok(json!(value.parse::<bool>().or_else(|_| match value {
                "1" => Ok(true),
                "0" => Ok(false),
                _ => anyhow::bail!("mount {text:?}: {key} is true or false"),
            })?))
        };
        match key.to_ascii_lowercase().as_str() {
            "type" => mount["Type"] = json!(value),
            "source" | "src" => mount["Source"] = json!(value),
            "target" | "dst" | "destination" => mount["Target"] = json!(value),
            "readonly" | "ro" => mount["ReadOnly"] = flag()?,
            "consistency" => mount["Consistency"] = json!(value),
            "bind-propagation" => mount["BindOptions"]["Propagation"] = json!(value),
            "bind-nonrecursive" => mount["BindOptions"]["NonRecursive"] = flag()?,
            "bind-create-src" => mount["BindOptions"]["CreateMountpoint"] = flag()?,
            "bind-recursive" => match value {
                "enabled" => {}
                "disabled" => mount["BindOptions"]["NonRecursive"] = json!(true),
                "writable" => mount["BindOptions"]["ReadOnlyNonRecursive"] = json!(true),
                "readonly" => mount["BindOptions"]["ReadOnlyForceRecursive"] = json!(true),
                _ => anyhow::bail!("mount {text:?}: bind-recursive is enabled, disabled, writable or readonly"),
            },
            "volume-nocopy" => mount["VolumeOptions"]["NoCopy"] = flag()?,
            "volume-subpath" => mount["VolumeOptions"]["Subpath"] = json!(value),
            "volume-label" => add_pairs(&mut mount["VolumeOptions"]["Labels"], &[value.to_owned()]),
            "volume-driver" => mount["VolumeOptions"]["DriverConfig"]["Name"] = json!(value),
            "volume-opt" => add_pairs(&mut mount["VolumeOptions"]["DriverConfig"]["Options"], &[value.to_owned()]),
            "image-subpath" => mount["ImageOptions"]["Subpath"] = json!(value),
            "tmpfs-size" => mount["TmpfsOptions"]["SizeBytes"] = json!(size(value)?),
            "tmpfs-mode" => {
                let mode = u32::from_str_radix(value, 8);
                let mode = mode.with_context(|| format!("mount {text:?}: tmpfs-mode is octal, such as 1777"))?;
                mount["TmpfsOptions"]["Mode"] = json!(mode);
            }
            _ => anyhow::bail!("mount {text:?}: {key:?} is not known"),
        }
    }
    anyhow::ensure!(
        mount.get("Target").is_some(),
        "mount {text:?} has no target: write type=volume,source=data,target=/data"
    );
    Ok(mount)
}

/// Reads `nofile=1024:2048`.
pub(crate) fn ulimit(text: &str) -> anyhow::Result<Value> {
    let wrong = || anyhow::anyhow!("ulimit {text:?} cannot be read: write nofile=1024:2048");
    let (name, limits) = text.split_once('=').ok_or_else(wrong)?;
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let (soft, hard): (i64, i64) = (soft.parse().map_err(|_| wrong())?, hard.parse().map_err(|_| wrong())?);
    Ok(json!({"Name": name, "Soft": soft, "Hard": hard}))
}

/// How a container's health is looked at.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct HealthArgs {
    /// A shell command that succeeds while it is healthy
    #[arg(long, value_name = "COMMAND")]
    health_cmd: Option<String>,
    #[arg(long, value_name = "TIME")]
    health_interval: Option<String>,
    #[arg(long, value_name = "TIME")]
    health_timeout: Option<String>,
    #[arg(long, value_name = "N")]
    health_retries: Option<u64>,
    #[arg(long, value_name = "TIME")]
    health_start_period: Option<String>,
    /// Between checks while it starts
    #[arg(long, value_name = "TIME")]
    health_start_interval: Option<String>,
    /// Ignore the image's health check
    #[arg(long)]
    no_healthcheck: bool,
}

impl HealthArgs {
    /// Writes down what is asked for, and leaves the rest as it is.
    pub(crate) fn apply(&self, container: &mut Value) -> anyhow::Result<()> {
        if self.no_healthcheck {
            container["Healthcheck"] = json!({"Test": ["NONE"]});
            return Ok(());
        }
        let time = |text: &Option<String>| text.as_ref().map(|t| duration(t).map(|n| json!(n))).transpose();
        for (member, value) in [
            ("Test", self.health_cmd.as_ref().map(|command| json!(["CMD-SHELL", command]))),
            ("Interval", time(&self.health_interval)?),
            ("Timeout", time(&self.health_timeout)?),
            ("Retries", self.health_retries.map(|n| json!(n))),
            ("StartPeriod", time(&self.health_start_period)?),
            ("StartInterval", time(&self.health_start_interval)?),
        ] {
            if let Some(value) = value {
                container["Healthcheck"][member] = value;
            }
        }
        Ok(())
    }
}

/// Reads `NETWORK`, or `name=NETWORK` with what is asked of the place there.
pub(crate) fn network_place(text: &str) -> anyhow::Result<(String, Value)> {
    if !text.contains('=') {
        return Ok((text.to_owned(), json!({})));
    }
    let (mut name, mut place, mut aliases, mut link_local) = (None, json!({}), Vec::new(), Vec::new());
    for part in text.split(',') {
        let wrong = || format!("network {text:?} cannot be read: {part:?} is no KEY=VALUE that is known");
        let (key, value) = part.split_once('=').with_context(wrong)?;
        match key {
            "name" => name = Some(value.to_owned()),
            "alias" => aliases.push(value),
            "link-local-ip" => link_local.push(value),
            "ip" => place["IPAMConfig"]["IPv4Address"] = json!(value),
            "ip6" => place["IPAMConfig"]["IPv6Address"] = json!(value),
            "mac-address" => place["MacAddress"] = json!(value),
            "gw-priority" => place["GwPriority"] = json!(value.parse::<i64>().with_context(wrong)?),
            "driver-opt" => {
                let (option, value) = value.split_once('=').with_context(wrong)?;
                place["DriverOpts"][option] = json!(value);
            }
            _ => anyhow::bail!(wrong()),
        }
    }
    if !aliases.is_empty() {
        place["Aliases"] = json!(aliases);
    }
    if !link_local.is_empty() {
        place["IPAMConfig"]["LinkLocalIPs"] = json!(link_local);
    }
    Ok((name.with_context(|| format!("network {text:?} cannot be read: name=NETWORK is missing"))?, place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_go_reads_them() {
        for (text, want) in [("500ms", 500_000_000), ("1h30m", 5_400_000_000_000), ("1.5s", 1_500_000_000)] {
            assert_eq!(duration(text).unwrap(), want, "{text}");
        }
        for text in ["", "5", "x", "5 s", "-1s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[track_caller]
    fn check_mount(text: &str, want: &str) {
        let got = mount(text).map_or_else(|error| format!("{error:#}"), |mount| mount.to_string());
        assert!(got.contains(want), "{got} should say {want}");
    }

    #[test]
    fn mounts_are_read_or_refused() {
        check_mount("type=tmpfs,dst=/t,tmpfs-size=1m", r#""SizeBytes":1048576"#);
        check_mount("type=bind,src=/a,dst=/b,ro", r#""ReadOnly":true"#);
        check_mount("src=data,dst=/b,volume-opt=type=nfs,volume-opt=o=addr=1.2.3.4", r#""o":"addr=1.2.3.4""#);
        check_mount("src=data,dst=/b,readonly=maybe", "true or false");
        check_mount("type=volume", "has no target");
        check_mount("dst=/b,colour=red", "not known");
    }

    #[test]
    fn sizes_and_words_are_read_or_refused() {
        assert_eq!(size("64m").unwrap(), 64 << 20);
        assert!(size("much").is_err());
        assert_eq!(words("sh -c 'a b'").unwrap(), ["sh", "-c", "a b"]);
        assert!(words("sh -c 'a").is_err());
    }

    #[test]
    fn networks_are_read_with_what_is_asked_of_the_place_there() {
        let read = |text: &str| network_place(text).map_err(|error| format!("{error:#}"));
        assert_eq!(read("green").unwrap(), ("green".into(), json!({})));
        let (name, place) = read("name=green,alias=a,alias=b,ip=10.1.0.9,gw-priority=-1,driver-opt=x=y").unwrap();
        assert_eq!(name, "green");
        let want = json!({"IPAMConfig": {"IPv4Address": "10.1.0.9"}, "GwPriority": -1, "DriverOpts": {"x": "y"},
            "Aliases": ["a", "b"]});
        assert_eq!(place, want);
        assert!(read("alias=a").unwrap_err().contains("name=NETWORK is missing"));
        assert!(read("name=green,colour=red").unwrap_err().contains("colour=red"));
        assert!(read("name=green,gw-priority=high").is_err());
    }
}
