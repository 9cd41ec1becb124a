//! `cargo xtask drill`: injects each alert's fault, and checks that the alert fires and resolves. A real Prometheus
//! evaluates the shipped rules on a faster clock (`common::prometheus::scale`). At the end every panel of the dashboards has
//! to have data. The check `alerts` of `cargo xtask e2e` drills the alerts that need a cluster.

mod collector;
mod faults;
mod scene;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::args::Drill as Args;
use common::prometheus::{self, ON_A_CLUSTER, Prometheus, RULES, Watch, scale};
use common::steps::{Progress, Tally};
use common::{signals, workspace};
use harness::{install, places};

use crate::dashboards::check::{self, Scope};
use crate::rules::{self, Rule};
use faults::{DRILLS, Drill, Lane};
use scene::Scene;

/// Alerts that are not drilled: those on the kubelet's volumes, which are as full as the disk of the machine.
const UNIT_TEST_ONLY: [&str; 1] = ["ChatServiceVolumeFilling"];

/// From the fault to the alert: the longest `for`, three hours, and a minute for a queue to fill.
const FIRE_LIMIT: Duration = Duration::from_secs(3 * 3600 / scale::FACTOR as u64 + 60);
/// From the end of the fault to the end of the alert: the longest window that has to forget it, six hours, and a minute.
const RESOLVE_LIMIT: Duration = Duration::from_secs(6 * 3600 / scale::FACTOR as u64 + 60);
/// For all queries of all panels.
const PANELS_LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(250);

/// The result of a drill.
struct Outcome {
    drill: &'static Drill,
    times: Result<Vec<Times>>,
    /// Other alerts that the fault fired, which is allowed.
    others: BTreeSet<String>,
}

struct Times {
    alert: &'static str,
    fired_after: Duration,
    resolved_after: Duration,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if args.list {
        list()?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut tally = Tally::default();
    play(&mut tally, args)?;
    Ok(tally.close())
}

/// Fails with the names of alerts without a drill, and of drills without an alert.
fn check_coverage() -> Result<()> {
    let mut rules = rules::all()?;
    rules.retain(|rule| rule.alert.is_some());
    let local = DRILLS.iter().flat_map(|drill| drill.alerts);
    let drilled: BTreeSet<&str> = local.chain(&ON_A_CLUSTER.1).copied().collect();
    // A bare name is enough for a rule without a namesake.
    let proven = |rule: &Rule| {
        let namesakes = rules.iter().filter(|other| other.alert == rule.alert).count();
        drilled.iter().any(|key| is_of(key, rule) && (namesakes == 1 || key.contains(' ')))
            || UNIT_TEST_ONLY.iter().any(|key| is_of(key, rule))
    };
    let missing: Vec<String> = rules.iter().filter(|rule| !proven(rule)).map(key).collect();
    ensure!(
        missing.is_empty(),
        "no drill for {}: add one to xtask/measure/src/drill/faults.rs",
        missing.join(", ")
    );
    let named = drilled.iter().copied().chain(UNIT_TEST_ONLY);
    let gone: Vec<&str> = named.filter(|key| !rules.iter().any(|rule| is_of(key, rule))).collect();
    ensure!(gone.is_empty(), "{RULES} has no alerts {gone:?}, which are drilled or excused");
    Ok(())
}

/// How a drill calls an alert: `Name 1h` by its window if it has one, else `Name critical` by its severity.
fn key(rule: &Rule) -> String {
    let which = if rule.label("window").is_empty() { rule.label("severity") } else { rule.label("window") };
    format!("{} {which}", rule.alert.as_deref().unwrap_or_default())
}

/// Whether `key` means this rule: `Name`, `Name 1h` or `Name critical`.
fn is_of(key: &str, rule: &Rule) -> bool {
    scale::is(key, rule.alert.as_deref().unwrap_or_default(), [rule.label("severity"), rule.label("window")])
}

fn list() -> Result<()> {
    check_coverage()?;
    for drill in &DRILLS {
        for alert in drill.alerts {
            println!("  {alert:<36}{}", drill.fault);
        }
    }
    for alert in ON_A_CLUSTER.1 {
        println!("  {alert:<36}on a cluster: cargo xtask e2e --only {}", ON_A_CLUSTER.0);
    }
    for alert in UNIT_TEST_ONLY {
        println!("  {alert:<36}not drilled: unit test only");
    }
    Ok(())
}

/// The drills of this alert, by its name alone or with its window.
fn chosen(alert: Option<&str>) -> Result<Vec<&'static Drill>> {
    let Some(alert) = alert else { return Ok(DRILLS.iter().collect()) };
    let means = |key: &str| key == alert || key.split_once(' ').is_some_and(|(name, _)| name == alert);
    let (check, on_a_cluster) = ON_A_CLUSTER;
    ensure!(
        !on_a_cluster.contains(&alert),
        "only a cluster can show {alert}: cargo xtask e2e --only {check}"
    );
    ensure!(!UNIT_TEST_ONLY.contains(&alert), "{alert} is not drilled: only its unit test proves it");
    let found: Vec<_> = DRILLS.iter().filter(|drill| drill.alerts.iter().any(|key| means(key))).collect();
    ensure!(!found.is_empty(), "no alert {alert}; --list names them all");
    Ok(found)
}

fn play(tally: &mut Tally, args: &Args) -> Result<()> {
    let started = Instant::now();
    let covered = tally.check("every alert drilled", "", |_| check_coverage());
    if covered.is_none() {
        return Ok(());
    }
    let drills = chosen(args.alert.as_deref())?;
    let dir = places::target_dir()?.join("drill");
    clear(&dir)?;
    let Some((scenes, prometheus)) = tally.check("stage", "", |progress| set_stage(progress, &dir, &drills))
    else {
        return Ok(());
    };
    let mut outcomes = Vec::new();
    tally.check("drills", "", |progress| {
        outcomes = drill_all(progress, &prometheus, &scenes, &drills);
        prometheus.rules_are_healthy()
    });
    print_table(&outcomes);
    // A single fault does not fill every panel.
    if args.alert.is_none() {
        tally.check("panels", "", |progress| check_panels(progress, &prometheus, started.elapsed()));
    }
    for outcome in outcomes {
        match outcome.times {
            Ok(times) => tally.passed += times.len() as u64,
            Err(error) => {
                tally.failed += outcome.drill.alerts.len() as u64;
                println!("  {}: {error:#}", outcome.drill.fault);
                println!("  fix: cargo xtask drill {} --keep", outcome.drill.alerts[0]);
            }
        }
    }
    println!("  drill: {:.0} s in all", started.elapsed().as_secs_f32());
    if args.keep {
        println!("  Prometheus: {}; files: {}; Ctrl-C ends all", prometheus.url(), workspace::shown(&dir));
        while !signals::asked_to_end() {
            thread::sleep(POLL);
        }
    }
    Ok(())
}

/// Every panel of the dashboards has data of the drills.
fn check_panels(progress: &Progress, prometheus: &Prometheus, range: Duration) -> Result<()> {
    // The first fault is still within the range of the last query.
    let range = range + PANELS_LIMIT;
    // As in Grafana: no scrape falls between two points of a graph.
    let rate_interval = (scale::SCRAPE_INTERVAL * 4).max(range / check::POINTS + scale::SCRAPE_INTERVAL);
    let scope = Scope { rate_interval, range, ..Scope::default() };
    let report = check::check_panels(&prometheus.url(), &scope)?;
    for line in report.to_string().lines() {
        progress.note(line.trim_start());
    }
    Ok(())
}

/// Removes an earlier run's files, and its servers if it was killed.
fn clear(dir: &Path) -> Result<()> {
    for lane in Lane::ALL {
        for server in ["postgres", "redis"] {
            harness::servers::clear(&dir.join(lane.namespace()).join(server))?;
        }
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove {}", dir.display()));
        }
        _ => {}
    }
    for lane in Lane::ALL {
        fs::create_dir_all(dir.join(lane.namespace()))?;
    }
    Ok(())
}

/// The lanes that are needed, all at once, and a Prometheus that scrapes them.
fn set_stage(progress: &Progress, dir: &Path, drills: &[&Drill]) -> Result<(Vec<(Lane, Scene)>, Prometheus)> {
    install::ensure_programs(|line| progress.note(line))?;
    progress.run(workspace::build("chat-service"))?;
    let binary = places::service_binary()?;
    let lanes = Lane::ALL.into_iter().filter(|lane| drills.iter().any(|drill| drill.lane == *lane));
    progress.say("servers and replicas");
    let scenes = thread::scope(|scope| {
        let starting: Vec<_> = lanes
            .map(|lane| {
                let binary = &binary;
                (lane, scope.spawn(move || Scene::start(dir, binary, lane)))
            })
            .collect();
        starting
            .into_iter()
            .map(|(lane, scene)| Ok((lane, scene.join().expect("no panic")?)))
            .collect::<Result<Vec<_>>>()
    })?;
    let jobs = scenes.iter().map(|(_, scene)| scene.scrape_job()).collect();
    let prometheus = Prometheus::start(progress, dir, &rules::files()?, jobs)?;
    prometheus.await_targets(Duration::from_secs(20))?;
    Ok((scenes, prometheus))
}

/// The lanes at the same time, and in each lane one drill after the other.
fn drill_all(
    progress: &Progress,
    prometheus: &Prometheus,
    scenes: &[(Lane, Scene)],
    drills: &[&'static Drill],
) -> Vec<Outcome> {
    let watch = Watch::new(prometheus);
    watch.during(progress, || {
        thread::scope(|scope| {
            let lanes: Vec<_> = scenes
                .iter()
                .map(|(lane, scene)| {
                    let ours: Vec<_> = drills.iter().copied().filter(|drill| drill.lane == *lane).collect();
                    let watch = &watch;
                    scope.spawn(move || {
                        ours.into_iter().map(|one| drill(watch, scene, one)).collect::<Vec<_>>()
                    })
                })
                .collect();
            lanes.into_iter().flat_map(|lane| lane.join().expect("no panic")).collect()
        })
    })
}

fn drill(watch: &Watch<'_>, scene: &Scene, drill: &'static Drill) -> Outcome {
    let started = Instant::now();
    let times = fire_and_resolve(watch, scene, drill);
    let history = watch.history();
    let others = history.all_since(started, scene.namespace).into_iter();
    let others = others.filter(|alert| !drill.alerts.iter().any(|key| alert.is(key, scene.namespace)));
    let others = others.map(prometheus::Alert::shown).collect();
    Outcome { drill, times, others }
}

fn fire_and_resolve(watch: &Watch<'_>, scene: &Scene, drill: &'static Drill) -> Result<Vec<Times>> {
    // An alert of an earlier fault would prove nothing.
    watch.wait(RESOLVE_LIMIT, "fires before its fault", drill.alerts, |history, alert| {
        (!history.fires(alert, scene.namespace)).then_some(())
    })?;
    let injected = Instant::now();
    let outcome = (drill.inject)(scene).context("inject the fault").and_then(|()| {
        watch.wait(FIRE_LIMIT, "did not fire", drill.alerts, |history, alert| {
            Some(history.since(injected, alert, scene.namespace)?.0)
        })
    });
    // In any case, the next drill needs a healthy service.
    let healed = Instant::now();
    (drill.heal)(scene).context("heal the fault")?;
    scene.await_ready()?;
    let fired = outcome?;
    let resolved = watch.wait(RESOLVE_LIMIT, "did not resolve", drill.alerts, |history, alert| {
        history.since(injected, alert, scene.namespace)?.1
    })?;
    let times = drill.alerts.iter().zip(fired.into_iter().zip(resolved));
    Ok(times
        .map(|(alert, (fired, resolved))| Times {
            alert,
            fired_after: fired - injected,
            resolved_after: resolved.saturating_duration_since(healed),
        })
        .collect())
}

fn print_table(outcomes: &[Outcome]) {
    println!("\n  {:<32}{:<42}{:>8}{:>11}", "alert", "fault", "fires", "resolves");
    for Outcome { drill, times, others } in outcomes {
        let Ok(times) = times else {
            for alert in drill.alerts {
                println!("  {alert:<32}{:<42}{:>8}", drill.fault, "FAILED");
            }
            continue;
        };
        for times in times {
            let (fired, resolved) = (times.fired_after.as_secs_f32(), times.resolved_after.as_secs_f32());
            println!("  {:<32}{:<42}{fired:>6.1} s{resolved:>9.1} s", times.alert, drill.fault);
        }
        if !others.is_empty() {
            println!("    with it: {}", others.iter().cloned().collect::<Vec<_>>().join(", "));
        }
    }
    println!();
}
