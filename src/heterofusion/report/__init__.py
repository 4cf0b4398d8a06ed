"""Reports of results: tables and statistics, pictures of scores, and pictures of one fusion.

    results.json -> results -> rows -> score_pictures, claims -> document
    diagnostics.json -> fusion -> fusion_pictures; trainer_state.json -> training; the method itself -> method

Pictures need matplotlib, which is imported when the first one is drawn.
"""

from heterofusion.report.score_pictures import draw_scores
from heterofusion.report.training import draw_training

__all__ = ["draw_scores", "draw_training"]
