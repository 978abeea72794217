//! Stacks: services brought up together from compose files, by `skep` and by docker's client.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::BTreeMap;

use serde_json::{Value, json};
use skep_chaos_tests::{Host, Rig, has_docker, take_turn};

/// Nearly every key that services of a swarm know, in both of its forms where it has two.
const ALL: &str = r#"
version: "3.13"
x-usual: &usual
  image: skep/whoami
  labels: {of: container}
services:
  first:
    <<: *usual
    command: serve --name "a b"
    entrypoint: ["/bin/skep-whoami", "-x"]
    environment: {A: 1, B: "two $$", C: "${NOT_SET_ANYWHERE:-fallback}", D: "yes", E: 1.5, F: ""}
    env_file: [one.env]
    hostname: h1
    user: "1000:1000"
    working_dir: /tmp
    networks:
      back: {aliases: [other]}
      front:
    ports:
      - "18001-18002:81-82/udp"
      - "8000"
      - {target: 90, published: 19090, mode: host, protocol: tcp}
    secrets:
      - plain
      - {source: named, target: /run/pw, uid: "5", gid: "6", mode: 0400}
    configs:
      - {source: note, target: /etc/note}
    volumes:
      - data:/data:ro
      - ./below:/below:rw,rslave
      - /anonymous
      - {type: volume, source: driven, target: /driven, volume: {nocopy: true}}
      - {type: tmpfs, target: /scratch, tmpfs: {size: 1048576}}
      - {type: bind, source: ./below, target: /bound, read_only: true, bind: {propagation: rshared}}
    healthcheck: {test: "true", interval: 1m30s, timeout: 10s, retries: 5, start_period: 40s}
    logging: {driver: json-file, options: {max-size: 1m}}
    dns: 10.1.1.1
    dns_search: [a.example, b.example]
    extra_hosts: ["db:10.9.9.9", "v6:::1"]
    init: true
    read_only: true
    stdin_open: true
    tty: true
    stop_signal: SIGINT
    stop_grace_period: 1m20s
    sysctls: {net.core.somaxconn: 1024}
    cap_add: [NET_ADMIN]
    cap_drop: [ALL]
    ulimits: {nproc: 100, nofile: {soft: 200, hard: 400}}
    depends_on: [second]
    restart: always
    deploy:
      replicas: 2
      endpoint_mode: vip
      labels: [a=b, c]
      placement:
        constraints: [node.role == manager, "node.labels.none != x"]
        preferences: [{spread: node.labels.zone}]
        max_replicas_per_node: 3
      resources:
        limits: {cpus: "0.50", memory: 50M, pids: 99}
        reservations: {cpus: "0.01", memory: 8m, generic_resources: [{discrete_resource_spec: {kind: card, value: 2}}]}
      restart_policy: {condition: on-failure, delay: 5s, max_attempts: 3, window: 2m}
      update_config: {parallelism: 0, delay: 10s, failure_action: rollback, monitor: 3s, max_failure_ratio: 0.25, order: start-first}
      rollback_config: {order: stop-first}
  second:
    image: skep/whoami
    environment: [X=y, "Z=a=b"]
    labels: ["k=v"]
    command: ["--ready-after", "0"]
    healthcheck: {disable: true}
    sysctls: ["net.core.somaxconn=1024"]
    restart: on-failure:4
    networks: [default, front]
    deploy: {mode: global}
  third:
    image: skep/whoami
    deploy: {mode: replicated-job, replicas: 1}
    restart: unless-stopped
networks:
  back: {driver_opts: {encrypted: "false"}, internal: true, labels: {l: m}, ipam: {config: [{subnet: 10.77.99.0/24}]}}
  front: {name: named-STACK, attachable: true}
volumes:
  data: {labels: {v: w}}
  driven: {driver: local, driver_opts: {type: tmpfs, device: tmpfs, o: "size=1m"}}
secrets:
  plain: {file: note}
  named: {file: note, name: named-secret-STACK, labels: {s: t}}
configs:
  note: {file: ./note, template_driver: golang}
"#;

fn write(host: &Host, name: &str, text: &str) -> String {
    let path = host.dir().join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// The specs of a stack's services, networks, secrets and configs, with names instead of ids, and without that of the stack.
fn declared(host: &Host, stack: &str) -> BTreeMap<String, Value> {
    let get = |path: &str| {
        let text =
            host.exec("curl", &["-sf", "--unix-socket", host.socket().trim_start_matches("unix://"), path]).stdout;
        serde_json::from_str::<Value>(&text).unwrap()
    };
    let filters = format!("filters=%7B%22label%22%3A%5B%22com.docker.stack.namespace%3D{stack}%22%5D%7D");
    let mut names = BTreeMap::new();
    let mut all = BTreeMap::new();
    for kind in ["networks", "secrets", "configs", "services"] {
        for mut object in get(&format!("http://d/{kind}?{filters}")).as_array().unwrap().clone() {
            let (id, mut spec) = match kind {
                "networks" => {
                    let id = object["Id"].take();
                    for of_its_own in ["Created", "Peers"] {
                        object[of_its_own].take();
                    }
                    if object["IPAM"]["Config"][0]["Subnet"].as_str().is_some_and(|subnet| subnet.starts_with("10.0."))
                    {
                        // One of the swarm's choice.
                        object["IPAM"]["Config"].take();
                    }
                    (id, object)
                }
                _ => (object["ID"].take(), object["Spec"].take()),
            };
            if let Some(container) = spec["TaskTemplate"]["ContainerSpec"].as_object_mut() {
                // Docker's client says that nothing is asked for.
                assert!(container.remove("Privileges").is_none_or(|asked| asked == json!({"NoNewPrivileges": false})));
            }
            names.insert(id.as_str().unwrap().to_owned(), spec["Name"].as_str().unwrap().to_owned());
            let mut text = spec.to_string();
            for (id, name) in &names {
                text = text.replace(id, name);
            }
            let spec: Value = serde_json::from_str(&text.replace(stack, "STACK")).unwrap();
            all.insert(format!("{kind} {}", spec["Name"].as_str().unwrap()), spec);
        }
    }
    all
}

#[test]
fn a_file_means_to_skep_what_it_means_to_docker() {
    take_turn!();
    if !has_docker() {
        return;
    }
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    write(host, "note", "noted");
    write(host, "one.env", "# a comment\nA=overridden\nFROM_FILE=yes\n");
    std::fs::create_dir_all(host.dir().join("below")).unwrap();
    let mut both = Vec::new();
    for stack in ["stackone", "stacktwo"] {
        let file = write(host, &format!("{stack}.yml"), &ALL.replace("STACK", stack));
        let deploy = ["stack", "deploy", "--detach=true", "--resolve-image", "never", "-c", &file, stack];
        if stack == "stackone" {
            host.docker(&deploy);
        } else {
            host.ok(&deploy);
        }
        both.push(declared(host, stack));
        // One client makes a stack of single objects and removes them one after the other without waiting, the other waits.
        let remove = ["stack", "rm", stack];
        drop(if stack == "stackone" { host.docker(&remove) } else { host.ok(&remove) });
        for kind in ["network", "secret", "config", "service"] {
            let left = host.ok(&[kind, "ls", "--filter", &format!("label=com.docker.stack.namespace={stack}")]);
            assert!(!left.contains(stack), "{left}");
        }
    }
    let docker = &both[0];
    assert_eq!(docker.len(), 3 + 2 + 1 + 3, "{:?}", docker.keys());
    for (name, spec) in docker {
        let ours = both[1].get(name).unwrap_or(&Value::Null);
        assert!(ours == spec, "{name}:\n{ours:#}\n{spec:#}");
    }
    assert_eq!(docker.len(), both[1].len());
}

const SHOP: &str = r#"
services:
  web:
    image: skep/whoami
    environment: {COLOUR: "${COLOUR}"}
    env_file: [{path: nowhere.env, required: false}]
    secrets: [key, path]
    configs: [motd]
    networks: [back]
    deploy: {replicas: 2, update_config: {monitor: 500ms}}
  worker:
    image: skep/whoami
    build: .
    restart: "no"
networks: {back: {}, unused: {}}
secrets: {key: {file: note}, path: {environment: PATH}}
configs: {motd: {content: "hello"}}
"#;

#[test]
fn a_stack_is_deployed_changed_and_removed() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    let host = rig.host(1);
    write(host, "note", "noted");
    let shop = write(host, "shop.yml", SHOP);
    let over = write(host, "over.yml", "services: {web: {environment: [SIZE=xl], deploy: {replicas: 3}}}");
    let deployed = host.run(&["stack", "deploy", "--resolve-image", "never", "-c", &shop, "shop"]);
    assert!(deployed.success, "{}", deployed.stderr);
    assert!(deployed.stderr.contains("Ignoring unsupported options: build"), "{}", deployed.stderr);
    assert!(deployed.stderr.contains("variable COLOUR is not set"), "{}", deployed.stderr);
    for made in [
        "Creating network shop_back",
        "Creating network shop_default",
        "Creating secret shop_key",
        "Creating service shop_web",
    ] {
        assert!(deployed.stdout.contains(made), "{made}: {}", deployed.stdout);
    }
    assert!(!deployed.stdout.contains("unused"), "{}", deployed.stdout);
    // It has waited for them.
    assert_eq!(
        host.ok(&["stack", "services", "--format", "{{.Name}} {{.Replicas}}", "shop"]),
        "shop_web 2/2\nshop_worker 1/1\n"
    );
    // What docker's client does not read, or passes over.
    let data = host.ok(&["config", "inspect", "-f", "{{.Spec.Data}}", "shop_motd"]);
    assert_eq!(data.trim(), "aGVsbG8=");
    let (_, pid) = host.running().into_iter().find(|(name, _)| name.starts_with("shop_web.")).unwrap();
    let secret = std::fs::read_to_string(format!("/proc/{pid}/root/run/secrets/path")).unwrap();
    assert!(secret.contains("/bin"), "{secret}");
    let restart = ["service", "inspect", "-f", "{{.Spec.TaskTemplate.RestartPolicy.Condition}}", "shop_worker"];
    assert_eq!(host.ok(&restart).trim(), "none");
    assert_eq!(host.ok(&["stack", "ls", "--format", "{{.Name}} {{.Services}}"]), "shop 2\n");
    assert_eq!(host.ok(&["stack", "ps", "-q", "shop"]).lines().count(), 3);
    let running = |host: &Host| host.ok(&["stack", "ps", "-q", "--filter", "desired-state=running", "shop"]);
    let before = running(host);

    // What says the same changes nothing; a second file adds to the first.
    let again = ["stack", "up", "--resolve-image", "never", "-c", &shop, "shop"];
    host.ok(&again);
    assert_eq!(running(host), before);
    host.ok(&["stack", "up", "--resolve-image", "never", "-c", &shop, "-c", &over, "shop"]);
    let env = host.ok(&["service", "inspect", "-f", "{{json .Spec.TaskTemplate.ContainerSpec.Env}}", "shop_web"]);
    assert_eq!(env.trim(), r#"["COLOUR=","SIZE=xl"]"#);
    assert!(host.ok(&["stack", "services", "shop"]).contains("3/3"));
    let config = host.ok(&["stack", "config", "-c", &shop, "-c", &over]);
    assert!(config.contains("SIZE: xl") && config.contains("COLOUR: \"\""), "{config}");
    let config = host.ok(&["stack", "config", "--skip-interpolation", "-c", &shop]);
    assert!(config.contains("${COLOUR}"), "{config}");

    // A secret that changed needs another name; nothing is renewed by halves before that is known.
    write(host, "note", "another");
    let refused = host.fails(&again);
    assert!(refused.contains("secret shop_key cannot become") && refused.contains("another name"), "{refused}");
    write(host, "note", "noted");
    write(host, "shop.yml", &SHOP.replace("  worker:", "  late:"));
    let pruned = host.ok(&["stack", "deploy", "--prune", "--resolve-image", "never", "-c", &shop, "shop"]);
    assert!(
        pruned.contains("Removing service shop_worker") && pruned.contains("Creating service shop_late"),
        "{pruned}"
    );
    host.ok(&["stack", "rm", "shop"]);
    assert!(!host.ok(&["network", "ls"]).contains("shop_") && !host.ok(&["secret", "ls"]).contains("shop_"));
    // It waits for tasks that take their time, though no network of the stack's does.
    rig.hosts().for_each(Host::import_busybox);
    let slow = "services: {slow: {image: busybox, command: [sh, -c, \"trap '' TERM; sleep 100\"], stop_grace_period: 3s, networks: [host]}}";
    let slow = write(host, "slow.yml", slow);
    host.ok(&["stack", "deploy", "--resolve-image", "never", "-c", &slow, "slow"]);
    host.ok(&["stack", "rm", "slow"]);
    assert!(rig.running().is_empty(), "{:?}", rig.running());
    assert!(host.fails(&["stack", "rm", "shop"]).contains("nothing was found of stack shop"));
    assert!(host.fails(&["stack", "ps", "shop"]).contains("stack shop has no services"));
}

#[test]
fn mistakes_in_files_are_told_with_their_line_and_nothing_is_made() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    let check = |text: &str, want: &str| {
        let file = write(host, "wrong.yml", text);
        let told = host.fails(&["stack", "deploy", "-c", &file, "wrong"]);
        assert!(told.contains(want), "{text}: {told} should say {want}");
    };
    let web = "services:\n  web:\n    image: skep/whoami\n    ";
    check(&format!("{web}colour: red\n"), "wrong.yml:4: services.web.colour: \"colour\" is not known in services.web");
    check(
        &format!("{web}deploy:\n      replicas: many\n"),
        "wrong.yml:5: services.web.deploy.replicas: \"many\" is no number",
    );
    check(
        &format!("{web}secrets: [key]\n"),
        "wrong.yml:4: services.web.secrets[0]: secret \"key\" is declared nowhere",
    );
    check(&format!("{web}networks: [back]\n"), "network \"back\" is declared nowhere");
    check(&format!("{web}volumes: [\"data:/data\"]\n"), "volume \"data\" is declared nowhere");
    check(&format!("{web}ports: [\"80:x\"]\n"), "wrong.yml:4: services.web.ports[0]: port \"80:x\" cannot be read");
    check(&format!("{web}hostname: ${{NOT_SET_ANYWHERE:?name it}}\n"), "variable NOT_SET_ANYWHERE is needed: name it");
    check(&format!("{web}env_file: nowhere.env\n"), "nowhere.env cannot be read");
    check("services: {web: {build: .}}\n", "it names no image");
    check(
        "services: {web: {image: a, networks: [out]}}\nnetworks: {out: {external: true}}\n",
        "network out is declared as external",
    );
    check("secrets: {key: {}}\n", "say what it holds");
    check("services: [web]\n", "wrong.yml:1: services: a map is needed here");
    check("services:\n  web: {image: a}\n  web: {image: b}\n", "duplicate");
    check("services: {web: {image: a\n", "no YAML that can be read");
    assert!(host.fails(&["stack", "deploy", "-c", "/nowhere.yml", "x"]).contains("/nowhere.yml cannot be read"));
    assert!(host.fails(&["stack", "deploy", "-c", "/dev/null", "a b"]).contains("no name for a stack"));
    assert_eq!(host.ok(&["service", "ls", "-q"]) + &host.ok(&["secret", "ls", "-q"]), "");
    assert!(!host.ok(&["network", "ls"]).contains("wrong"));
}
