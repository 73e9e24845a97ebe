"""The README's list of systems says what the catalog and the evidence say."""

from pathlib import Path

from coloss.lab.catalog import catalog

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_system_is_listed_with_its_verdict():
    rows = {}
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4:
            rows[cells[0].strip("`")] = cells
    for entry in catalog():
        slug, family, _, verdict = rows[entry.slug]
        assert family == entry.family
        assert verdict == (entry.evidence["verdict"] if entry.evidence else "not measured")
    assert set(rows) == {entry.slug for entry in catalog()}
