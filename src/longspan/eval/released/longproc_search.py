"""The searches that LongProc shows a model and expects of it, word for word: its files hold the problems alone.

countdown([9, 16, 6, 18], 12)     -> the equations that reach the target, and the search that finds them
travel(problem)                   -> the search for an order of cities, and the plan
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

_MOST = 2000
"""Intermediate results are below it."""
_START = "the starting point"


def countdown(numbers: Sequence[int], target: int) -> tuple[list[str], str]:
    """Return three equations that reach a target with four numbers, and the text of the search.

    Raises:
        ValueError: the target cannot be reached.
    """
    log: list[str] = []
    found = _reach([*numbers], target, 0, None, log)
    if found is None or len(found) != 3:
        raise ValueError(f"{list(numbers)} do not reach {target} in three steps")
    first, second, last = found
    text = (
        f"# Search Procedure\n{''.join(log)}\n\n"
        f"Now we have found the target, let's trace back the solution:\n"
        f"Final step: {last}\nThe step before: {second}\nThe first step: {first}\n\n"
        f"Output the solution in the required format:\n<Solution>\n{first}\n{second}\n{last}\n</Solution>\n"
    )
    return found, text


def _reach(
    numbers: list[float | int], target: int, depth: int, equation: str | None, log: list[str]
) -> list[str] | None:
    """Write a step of the search; return the equations from here to the target, None where there are none."""
    if equation is not None:
        value, begin = numbers[0], f"\n{_indent(depth)}Try {equation}. "
        if value != value or value % 1 != 0:
            dropped = "" if value != value else f"{value:.1f} is a decimal, "
            log.append(f"{begin}{dropped}drop this branch.")
            return None
        if value >= _MOST:
            log.append(f"{begin}{value} exceeds the maximum intermediate result, drop this branch.")
            return None
        if len(numbers) == 1:
            right = value == target
            sign, verdict = ("==", "target found!") if right else ("!=", "drop this branch.")
            log.append(f"{begin}Evaluate {value} {sign} {target}, {verdict}")
            return [] if right else None
        log.append(f"{begin}Add {value} to the number set. Current number set: ")
    else:
        log.append("Initial number set: ")
    pairs = list(combinations(range(len(numbers)), 2))
    options = [(numbers[one], numbers[two]) for one, two in pairs]
    if len(numbers) == 2:
        log.append(f"{numbers}, target: {target}, just two numbers left.")
    else:
        log.append(f"{numbers}, target: {target}. Options for choosing two numbers: {options}.")
        depth += 1
    for one, two in pairs:
        left = [number for place, number in enumerate(numbers) if place not in (one, two)]
        if len(numbers) > 2:
            log.append(
                f"\n{_indent(depth)}Pick two numbers ({numbers[one]}, {numbers[two]}) (numbers left: {left}). "
                "Try possible operations."
            )
        for result, step in _operations(max(numbers[one], numbers[two]), min(numbers[one], numbers[two])):
            rest = _reach([result, *left], target, depth + 1, step, log)
            if rest is not None:
                return [step, *rest]
    return None


def _operations(larger: Any, smaller: Any) -> Iterator[tuple[float | int, str]]:
    yield larger + smaller, f"{larger} + {smaller} = {larger + smaller}"
    yield larger - smaller, f"{larger} - {smaller} = {larger - smaller}"
    yield larger * smaller, f"{larger} * {smaller} = {larger * smaller}"
    if smaller == 0:
        yield float("nan"), f"{larger} / {smaller} (invalid operation)"
    elif larger % smaller == 0:
        yield larger // smaller, f"{larger} / {smaller} = {larger // smaller}"
    else:
        yield larger / smaller, f"{larger} / {smaller} = {larger / smaller:.1f}"


def travel(problem: Mapping[str, Any]) -> str:
    """Return the search for a travel plan, and the plan.

    Raises:
        ValueError, LookupError, TypeError: this is no problem, or it has no solution.
    """
    told = problem["constraints"]
    fixed = sorted((each for each in told if each["type"] == "fixed"), key=lambda each: each["start_day"])
    days = {each["city"]: each for each in fixed}
    free = [each for each in told if each["type"] == "duration" and each["city"] not in days]
    log = [
        "Read the requirements and identify the cities that have fixed schedules "
        "and the cities that need to be arranged."
    ]
    for each in told:
        if each["type"] != "fixed":
            line = f"* City: {each['city']}, Duration: {each['num_days']} days"
            log.append(f"{line}, {_schedule(days[each['city']])}" if each["city"] in days else f"{line}.")
    log += [
        "",
        *_listed("Cities that have fixed schedules", fixed, _schedule, " (sorted by their arrival days)"),
    ]
    log += [
        "",
        *_listed("Cities needing arrangement", free, lambda city: f"Duration: {city['num_days']} days."),
        "",
    ]
    flights = {(one, two) for one, two in problem["connected_cities"]}
    plan = _arrange(1, problem["num_cities"], [], free, fixed, flights, log)
    if plan is None:
        raise ValueError("the cities cannot be arranged")
    search = "\n".join(log)
    return (
        f"<Solving Procedure>\n{search}\n</Solving Procedure>\n\n"
        f"Output the plan in the required format:\n<Plan>\n{_written(plan)}\n</Plan>"
    )


def _schedule(city: Mapping[str, Any]) -> str:
    return f"Fixed Schedule: Day {city['start_day']} - {city['end_day']}."


def _listed(
    head: str, cities: Sequence[Mapping[str, Any]], words: Callable[[Mapping[str, Any]], str], more: str = ""
) -> list[str]:
    if not cities:
        return [f"{head}: None."]
    return [f"{head}{more}:", *(f"* City: {city['city']}, {words(city)}" for city in cities)]


def _arrange(
    day: int,
    count: int,
    plan: list[tuple[str, int, int]],
    free: Sequence[Mapping[str, Any]],
    fixed: Sequence[Mapping[str, Any]],
    flights: set[tuple[str, str]],
    log: list[str],
) -> list[tuple[str, int, int]] | None:
    """Write a step of the search; return the whole plan (city, first day, last day), None where there is none."""
    level = 2 * len(plan)

    def say(text: str) -> None:
        log.append(f"{_indent(level)}{text}")

    say(f"Current day: {day}. Current plan: [{', '.join(city for city, _, _ in plan)}].")
    if len(plan) == count:
        say(f"All {count} cities are arranged. Complete plan is found!")
        return plan
    say(f"Check whether the city with an arrival day of Day {day} - is fixed.")
    here = next((city for city in fixed if city["start_day"] == day), None)
    if here is not None:
        say(f"Yes. The city with an arrival day of Day {day} - is fixed: {here['city']}.")
        choices = [(here["city"], here["start_day"], here["end_day"])]
    else:
        names = ", ".join(city["city"] for city in free)
        say(
            f"No. Consider possible options from cities needing arrangement: [{names}] "
            "and explore these options in order."
        )
        choices = [(city["city"], day, day + city["num_days"] - 1) for city in free]
    last = plan[-1][0] if plan else _START
    following = next((city for city in fixed if city["start_day"] > day), None)
    level += 1
    for city, first, end in choices:
        length = end - first + 1
        say(
            f"Try arranging to visit {city} from Day {day}. Duration: {length} days. "
            f"Schedule: Day {day} - {day + length - 1}."
        )
        say(f"Check for direct flight from {last} to {city}.")
        if plan and (last, city) not in flights:
            say("No. Drop this branch.")
            continue
        say("Yes.")
        compatible, words = _compatible(city, end, following)
        after = (
            "None."
            if following is None
            else f"{following['city']} (Day {following['start_day']} - {following['end_day']})."
        )
        say(
            f"Check whether this arrangement is compatible with the next fixed schedule after Day {day}: {after}"
        )
        say(words)
        if not compatible:
            continue
        say("This arrangement is feasible for now. Continue to arrange the rest of the plan.")
        rest = [each for each in free if each["city"] != city]
        found = _arrange(end, count, [*plan, (city, first, end)], rest, fixed, flights, log)
        if found is not None:
            return found
    say(f"Fail to arrange any option on day {day} in the current arrangement. Drop this branch.")
    return None


def _compatible(city: str, end: int, following: Mapping[str, Any] | None) -> tuple[bool, str]:
    if following is None:
        return True, "No following fixed schedules. This arrangement is compatible."
    start = following["start_day"]
    late = start < end
    verdict = "incompatible. Drop this branch." if late else "compatible."
    relation = "later than (>)" if late else "not later than (<=)"
    return not late, (
        f"The departure day of {city} is Day {end}. The arrival day of {following['city']} is Day {start}. "
        f"Day {end} is {relation} Day {start}. This arrangement is {verdict}"
    )


def _written(plan: Sequence[tuple[str, int, int]]) -> str:
    lines = []
    for place, (city, first, end) in enumerate(plan):
        visit = f"Arriving in {city} and visit {city}" if place == 0 else f"Visit {city}"
        lines.append(f"**Day {first}-{end}:** {visit} for {end - first + 1} days.")
        if place + 1 < len(plan):
            lines.append(f"**Day {end}:** Fly from {city} to {plan[place + 1][0]}.")
    return "\n".join(lines)


def _indent(level: int) -> str:
    return f"{' ' * level}|- " if level else ""
