"""The notes on the canvases of the shipped workflows."""
from __future__ import annotations

MINIATURE = """## It works at once
The miniature world comes with the pack: tiny pictures (64 x 64), no download, seconds on any computer. It knows **cat, dog,
bear, bunny, robot, duck**, eight colours (red, orange, yellow, green, blue, purple, pink, white), **striped**, **half**,
**round belly**, **hat**, **scarf**, and the scenes **on the beach, in the forest, at night, in the snow, in a room**. For one
creature, **left**, **center** or **right** behind a comma chooses its place."""

PICTURES = """The example pictures lie in the pack's folder *workflows/inputs*. If **Load Image** does not find them, copy them
into ComfyUI's folder *input* and press **R**."""

MUTED = """Draw a frame round the muted nodes with **Ctrl** and the mouse, press **Ctrl+M**"""

def own_picture(*more: str) -> str:
    """How one's own picture gets its mask; more: further points of the list."""
    further = "\n".join(("", *more))
    return f"""## Your own picture
- A picture with a **transparent background**: choose it in **Load Image**, ready.
- **Any other picture**: {MUTED}, and drag the mask of *Remove Background* to the **mask** input in place of *White on the
  subject*. Its model file birefnet.safetensors belongs into *models/background_removal*.
- Or paint over the subject in the **mask editor** (right click on the picture) and bypass *White on the subject*
  (**Ctrl+B**).{further}

{PICTURES}"""


OWN_PICTURE = own_picture()

TWO_OWN_PICTURES = own_picture("""- The **second picture** in the same way: copy *Load Background Removal Model* and *Remove
  Background*, connect the copy to the second *Load Image*, and its mask in place of *White on the second*. Without a mask all of
  a picture counts as the subject.""")

SIZE = "512 x 512 for SD1.5, 1024 x 1024 for SDXL."


def own_model(second: str) -> str:
    """How a checkpoint takes the place of the miniature of CustAny; second: size and sampler."""
    return f"""## SD1.5 or SDXL in place of the miniature
1. **Load Checkpoint** gives model, clip and vae; **Load Subject Adapter** gives adapter and encoders. Connect them where *Load
   Miniature World* is connected now, and delete that one.
2. {second}
3. Bypass *Enlarge the tiny pictures* (**Ctrl+B**).

The adapter must have been trained for that base model. **No CustAny adapter for SD1.5 or SDXL is public**: train one (README,
*Train your own adapter*) and put it with its vision encoders into *models/likeness*. Core's *Preview as Text* on the **text**
output of *Load Subject Adapter* shows for which base one is."""


_BELOW = "steps and cfg of the block: see below."

OWN_MODEL = own_model(f"Size: {SIZE} Sampler: what your checkpoint likes, such as 25 steps and cfg 6.")

OWN_MODEL_SCENE = own_model(
    f"Size: {SIZE} *KSampler* of the scene: what your checkpoint likes, such as 25 steps and cfg 6; {_BELOW}")

OWN_MODEL_BLOCK = own_model(f"Size: {SIZE} It stands in the node whose title begins with *Size*; {_BELOW}")

OWN_CHECKPOINT = f"""## SD1.5, SDXL or any other model in place of the miniature
1. **Load Checkpoint** gives model, clip and vae. Connect them where *Load Miniature World* is connected now, and delete that one.
   No *Load Subject Adapter* is needed.
2. Size: {SIZE} Another model: its usual size. It stands in *Size: picture*; {_BELOW}
3. Bypass *Enlarge the tiny pictures* (**Ctrl+B**)."""

OWN_REALCUSTOM = """## SDXL in place of the miniature
1. **Load Checkpoint** gives model, clip and vae; **Load Subject Adapter** gives adapter and encoders. Connect them where *Load
   Miniature World* is connected now, and delete that one. Into *models/likeness* belong *RealCustom_highres.pth*
   (bytedance-research/RealCustom on Hugging Face), SigLIP SO400M 384 and DINOv2 large with registers.
2. *Size and number*: 1024 x 1024. Every *KSampler*: 25 steps, cfg 3.5.
3. Bypass *Enlarge the tiny pictures* (**Ctrl+B**).

A CustAny adapter that you trained yourself (README, *Train your own adapter*) works under these masks too, on SD1.5 or SDXL."""

INVERTED = """With a large model set **steps** and **cfg** in the block: 20 to 50 steps, cfg 1 to 4, since a high cfg holds on to
the old picture. Set the dials anew, they count steps. Bypass *Enlarge the tiny strip* where there is one, and give the grid of
*Identity fusion* cells of your picture's size."""

GUIDED = """With a large model set in every *Guidance Mask Generator* (in the block: on the block) **layers** to *all*, **values**
to *soft* and **refresh_until_step** to half of your steps; the values here are for the miniature, whose masks have 8 x 8 places.
**scope** is about the share of the picture that the subject shall fill: 0.2 to 0.3 for one, less for a part. A block that comes
new from the node library has values for SDXL already. Leave **left**, **center** and **right** out of your sentences: as places
behind a comma they are words of the miniature."""

GUIDED_TOO = """Set every *Guidance Mask Generator* (in the block: on the block) as the note of workflow 13 says, and leave
**left**, **center** and **right** out of your sentences."""


BUILDINGS = """## It works at once
The miniature CustomNet comes with the pack: tiny pictures (64 x 64) of toy buildings. It knows **block, house, tower** in eight
colours, always pictured from the right and from above, and the scenes **on the beach, in the forest, at night, in the snow, in a
room**."""

OWN_OBJECT = f"""## Your own object
- A picture with a **transparent background**: choose it in **Load Image**, ready.
- **Any other picture**: {MUTED}, and drag the mask of *Remove Background* to the **mask** input of *Prepare Reference* or, where
  the method is one block, of the block.

{PICTURES}"""

OWN_CUSTOMNET = """## The real CustomNet
1. Take *customnet_v1* from *TencentARC/CustomNet* on Hugging Face (for a background picture of your own the authors' script asks
   for *customnet_inpaint_v1*); put it into *models/checkpoints* and choose it in **Load CustomNet**.
2. Set every width and height (View Conditioner, the frame of Placement, or the block) to 256. KSampler: *ddim*,
   *ddim_uniform*, 50 steps, cfg 3.
3. Bypass every *Enlarge* node (**Ctrl+B**)."""


def note(*parts: str) -> str:
    """Text of a note: the line breaks of this file go, those of headings, lists and paragraphs stay."""
    out = []
    for block in "\n\n".join(part.strip() for part in parts).split("\n\n"):
        lines: list[str] = []
        for line in block.split("\n"):
            begins = line.startswith(("# ", "## ", "- ", "1. ", "2. ", "3. "))
            if begins or not lines or lines[-1].startswith(("# ", "## ")):
                lines.append(line.strip())
            else:
                lines[-1] += " " + line.strip()
        out.append("\n".join(lines))
    return "\n\n".join(out)


NOTES = {
    "1 Subject in a new scene": note("""# Subject in a new scene
**One picture of a subject in, new pictures of that same subject out, in the scene that you ask for.** The block *Keep a
Subject* looks at the picture, finds the word **cat** in your prompt, and brings this very cat into it.

## What to change
- **text**: another scene, such as *a photo of a cat on the beach, left*. The **word** must stand in the text.
- **global_strength**: colours and look as a whole. **local_strength**: details and pattern. 1 is as trained, 0 is off.
- **seed** in KSampler: other pictures. It is fixed, so that you can compare.

*Enter subgraph*, a button on the block, shows what is in it. You find the block again in the node library, among the
subgraph blueprints.""", OWN_PICTURE, MINIATURE, OWN_MODEL),
    "2 Two subjects": note("""# Two subjects
**Two pictures in, both subjects in one new picture.** Each subject has its own sentence with its own word (**cat**,
**bunny**) and its own **Dual-Level Injector**; the second one continues where the first one ends. A **mask** for the left half
and one for the right half say where each subject may act and where each sentence counts, so that the two do not mix.

## What to change
- **Left, right**: the two sentences. Give both the same scene. The **word** must stand in its sentence.
- **Left half, white**: make it wider or narrower, or connect masks that you have painted.
- Another seed, or a look at one of them alone: set both strengths of the other one's injector to 0.
- A third subject: one more picture, ID Extractor, sentence, injector and mask behind the last one.""",
        TWO_OWN_PICTURES, MINIATURE, OWN_MODEL),
    "3 Try on a garment": note(f"""# Try on a garment
**A picture of somebody with a scarf in, somebody else with that very scarf out.** The mask is white on the scarf alone, so the
ID Extractor sees nothing else, and the word is **scarf**. Who wears it is up to your prompt.

## What to change
- **text**: another creature or scene, such as *a photo of a yellow robot with a scarf on the beach*.
- **word**: the garment. It must stand in the text.
- **local_strength**: pattern and details of the garment.

## Your own picture
- **Load Image**: somebody who wears the garment. {MUTED}, write into *What to cut out* what it is, and drag the mask of *SAM3
  Detect* to the **mask** input of ID Extractor. SAM3's model file belongs into *models/checkpoints*.
- Or paint over the garment in the **mask editor** (right click on the picture) and connect the MASK of Load Image to ID
  Extractor.""", PICTURES, MINIATURE, OWN_MODEL),
    "4 Mix picture and word": note("""# Mix picture and word
**The picture shows a cat, the word says duck.** The word decides what it is, the picture decides how it looks: out comes a duck
with the colours, the pattern and the scarf of this cat.

## What to change
- **text** and **word**: *a photo of a robot at night*, word *robot*. Both must say the same.
- **local_strength**: how much of the picture's details comes along. **global_strength**: how much of its look as a whole.
- Too much of the cat? Lower both a little, or let the subject begin later (advanced: **start_percent**).""",
        OWN_PICTURE, MINIATURE, OWN_MODEL),
    "5 Story strip": note("""# Story strip
**One subject, four scenes, one strip.** The picture is looked at once. Each scene has its own sentence and runs through its own
copy of the block *One scene of the story*; core's Stitch Images puts the four pictures side by side.

## What to change
- **Scene 1 to Scene 4**: the sentences. The **word of the subject** must stand in each of them.
- **Seed of all pictures**: another strip. It is fixed, so that you can compare.
- A fifth scene: copy one block with its sentence, and one *Stitch Images*.

*Enter subgraph*, a button on each block, shows what is in it; a change inside counts for all four.""",
        OWN_PICTURE, MINIATURE, OWN_MODEL),
    "6 Exact inversion": note("""# Exact inversion
**A picture in, the same picture out (but for the VAE)**, after a walk up into noise and down again. In the block *Bring a Picture
Back* ResInversion Sampler records the way and what plain sampling would miss at each step, and BiMD Sampler walks it back. There
is no identity in it yet: this is the ground that the next workflows stand on.

## What to change
- **manipulation_start** of the block: at 20, the number of steps, every step is copied from the recording and the picture comes
  back to the last bit of its latent. At 0 each step is sampled anew, and the error stays small.
- **What it says** tells the error in dB: above 60 nobody sees it. The **plot** shows where the model had to be corrected.
- **cfg** of the block: raise it and look at plot and error. **closed_loop** takes the rest of the error away.

*Enter subgraph*, a button on the block, shows what is in it.

## Your own picture
Choose it in **Load Image**, and describe it in *What the picture shows*.""", PICTURES, MINIATURE, OWN_CHECKPOINT, INVERTED),
    "7 Change the subject, keep the scene": note("""# Change the subject, keep the scene
**A scene from words alone, then another subject inside it.** The model makes a scene picture. The block *Keep the Scene* records
how that picture turns into noise, and replays it with the subject of your reference picture inside. Its dial
**manipulation_start** says how much of the old picture stays: 0 lets the subject act from the first step, the number of steps
gives the old picture back unchanged. Three settings stand side by side.

## What to change
- **Dial 1 to Dial 3**: 0 to 20, the number of steps.
- **The scene in words**: another scene; change the two other prompts along with it.
- **backward_strength** on the blocks: how strongly the scene holds on to itself. 1 keeps most.
- A **mask** on the block: outside of it the old picture stays exactly.
- A picture of your own as the scene: connect Load Image (and *Upscale Image* to the size) to **image** of the blocks.""",
        OWN_PICTURE, MINIATURE, OWN_MODEL_SCENE, INVERTED),
    "8 Identity fusion": note("""# Identity fusion
**The way from one identity to another, as a row of pictures.** Two injectors bring both subjects into one model. In the block
*From One Identity to Another* Identity Fusion with **path** on gives the first picture the first identity alone and the last one
the second alone; the others lie between. All share one recording of one scene.

## What to change
- **pictures** of the block: how many lie on the way (and **columns** in the grid).
- Inside the block (*Enter subgraph*) **path** off, **weight** and **keep** at 0.5: one mixture in all pictures.
- **manipulation_start** of the block: more keeps more of the scene picture.

The strip of the recording shows the picture coming out of its noise.""",
        TWO_OWN_PICTURES, MINIATURE, OWN_MODEL_SCENE, INVERTED),
    "9 Identity on a drawing": note("""# Identity on a drawing
**A drawing in, the same drawing with another subject's look.** Nothing describes the style: it is in the recording of the
drawing, and the backward flow brings it along.

## What to change
- **Dial 1 to Dial 3**: 0 to 20; more keeps more of the drawing.
- **backward_strength** on the blocks: 1 keeps paper and line, less brings more of the subject and of the model's own style.
- The drawing: any style that your model can look at.

The miniature has never learned to draw in styles, so the drawing is foreign to it: lines and paper stay, and only some of the
new colours come in, on the belly and the ears. A large model knows many styles.""",
        OWN_PICTURE, MINIATURE, OWN_MODEL_BLOCK, INVERTED),
    "10 Turntable": note("""# Turntable
**One picture of an object in, the object from eight sides out**, at the place you ask for, in front of the background that your
words name. *View Conditioner* tells the model all three; *KSampler* paints the eight views in one batch, from one noise.

## What to change
- **start, end, count** in Turntable: which views. From -60 to 60 degrees is what was trained.
- **Background**: *a photo of a house in the forest*. The picture decides what the object looks like.
- **x, y, box_width, box_height** in Placement: where it stands. The preview shows it.
- **object_strength** in View Conditioner: how much the object's picture counts.""", BUILDINGS, OWN_OBJECT, OWN_CUSTOMNET),
    "11 Place in a background": note("""# Place in a background
**One picture of an object in, the same object turned and set into a scene of words.** All of it stands in one block: the box says
where, the camera from which side, the sentence what is round it.

## What to change
- **azimuth, elevation** in the block: the side you look at.
- **x, y, box_width, box_height**: where it stands, as parts of the picture. Inside the block (double-click) Placement takes a
  painted **mask** or the box of one of core's detectors in their place.
- **background**: another scene. **seed** in KSampler: other pictures.
- A **photo of your own as background**: with the inpaint file wake the muted group below the sampler, connect its picture to
  **background_picture** of the block, and the group's preview shows the object in the photo, whose own pixels stay outside of the
  box. The miniature and *customnet_v1* cannot see one.""", BUILDINGS, OWN_OBJECT, OWN_CUSTOMNET),
    "12 Swap a face, keep the scene": note("""# Swap a face, keep the scene
**CustomEnhancer's whole way, in one strip: the scene, the swap, the inversion, the result.** The model paints a scene from words.
**Face Swap** paints the head of your reference picture onto the head in it, and nothing else. The block *Keep the Scene* records
how that picture turns into noise, and replays it with the whole subject at work inside: what the swap could not reach follows.

## What to change
- **The scene in words**: another creature and scene; change the two other prompts along with it.
- **Dial**: 0 to 20, the number of steps. More keeps more of the picture after the swap, less lets the subject in.
- **mask_kind**, **colour_match**, **identity_weight** of Face Swap.
- Bypass *Face Swap* (**Ctrl+B**) to see what it is good for.

The miniature's face pack finds, knows and swaps heads of creatures: their two colours and their pattern. For people take the
workflows with PhotoMaker and InstantID, which need files of your own.""",
        OWN_PICTURE, MINIATURE, OWN_MODEL_SCENE, INVERTED, """With a large model choose **buffalo_l** in *Load Face Models*,
**inswapper_128** in *Load Face Swapper*, *auto* as the detection size, and in *Face Swap* **boost** 2 and **mask_kind** *hull*.
Use a swap of people only with their consent. There is no content filter: a node that checks pictures fits before **image** of
Face Swap, or behind it."""),
    "13 A mask you can see": note("""# A mask you can see
**The subject of your picture acts only where the model itself is drawing its word.** The block asks the model at each of the
first steps where the word **cat** is, and lets the cat of your picture in there and nowhere else. Each row of the result shows
one seed: the text alone, the last mask, and the subject under that mask. Scene, pose and place stay those of the text.

## What to change
- **Sentence**: another scene. The **word** of the block must stand in it.
- **scope**: how much of the picture the mask may cover. **refresh_until_step**: how long it follows the word; later steps keep
  the last mask. Each step with a fresh mask asks the model once more and takes longer: 12 of 25 cost about a quarter more time.
- **Preview Guidance** shows the masks step by step, for all pictures of the run; with **steps** at *last* it gives one for each
  picture, so *Size and number* may be what you like.
- **local_strength**: how strongly the subject acts inside the mask.
- The mask and the pictures go on to any node: masks from *Preview Guidance*, the rest from the block.""",
        OWN_PICTURE, MINIATURE, OWN_REALCUSTOM, GUIDED),
    "14 Two words, two subjects": note("""# Two words, two subjects
**Two pictures in, both subjects in one new picture, and nobody paints a mask.** Each subject has its word and its own live mask.
The masks keep the two apart: the cat's look goes to the cat, the bunny's look to the bunny. A row of the result is one seed:
both subjects, the mask of the first, the mask of the second, and the text alone.

## What to change
- The two sentences and words, and the **scope** of each mask. A third subject: one more sentence, word, mask and injector.
- **Preview Guidance** shows the last mask of each word. To see how it came, copy that node and set **steps** of the copy to
  *all*: the ones that are here feed the result.
- The miniature draws two creatures only when each has a sentence for its half, so the halves are part of this workflow. A large
  model takes *a cat and a bunny in the snow* in one sentence: give both *Subject Prompts* that same text, connect the first one's
  **conditioning** where *Both* is connected now, and delete the halves. The words **left** and **right** go with them.""",
        TWO_OWN_PICTURES, MINIATURE, OWN_REALCUSTOM, GUIDED_TOO),
    "15 Many words of one picture (One2Many)": note("""# Many words of one picture
**One picture, looked at once, and several words that take from it.** Row by row, from left to right: only the word **cat** gets
the look of the picture; only the word **duck** does; both do; the text alone. One *ID Extractor* serves all; each word has its
own live mask, and what no word names stays as the text makes it.

## What to change
- The two sentences and words, and the **scope** of each mask.
- A picture that holds several things: the word decides what is taken, such as *cat* and *scarf* of a cat with a scarf.
- The miniature draws two creatures only when each has a sentence for its half. A large model takes one sentence without **left**
  and **right**, and no halves: the note of workflow 14 says how.""",
        OWN_PICTURE, MINIATURE, OWN_REALCUSTOM, GUIDED_TOO),
    "16 Predict the mask, edit it, use it": note(f"""# Predict the mask, edit it, use it
**Where will the cat be? Look before you sample, change the mask, and use it.** *Predict Guidance Mask* takes the first steps with
the text alone and shows what the model has in mind, with the mask in colour. Here all below the neck is taken away, so that only
the head gets the look of the picture. A row of the result: the text alone, the whole mask, the edited mask.

## What to change
- **stop_step**: early steps know the place, later ones the outline. Each takes as long as a step of the sampler; the sampling
  itself is not slower, since with **mask_use** at *replace* it asks for no mask.
- The edit: a white bar above a black one, 40 and 24 parts of the height, made as large as the picture, says what stays. Any other
  mask node does as well.
- The edit by hand: {MUTED} (in *Paint it by hand*), and queue: it saves each picture with its mask as transparency.
  Drop such a file from ComfyUI's output folder on a new *Load Image*, open the **mask editor** (right click on the picture): the
  predicted mask is there, change it and save. Connect that node's **MASK** to *Edited*, where the edited mask is connected now;
  one MASK serves all pictures.
- **mask_use** at *multiply*: the word's live mask, and yours limits it.
- The seed feeds both, the prediction and the samplers; change it in one place.""",
        OWN_PICTURE, MINIATURE, OWN_REALCUSTOM, """Set *Predict Guidance Mask* as the note of workflow 13 says of the *Guidance
Mask Generator*, with your **steps**, **scheduler** and **cfg** (an advanced widget: the same as in the samplers); its width and
height do nothing here, *Size and number* counts. Leave **left**, **center** and **right** out of your sentence."""),
    "17 Round after round": note("""# Round after round
**The picture of one round is the reference of the next.** Round 1 draws your bunny in the snow. Its own mask cuts the bunny
out of that picture, and round 2 begins with the cut-out, round 3 with that of round 2: what a round invents, the next one knows.
And the word may grow: in rounds 1 and 2 it is *bunny*, in round 3 *bunny with a scarf*, so the scarf belongs to the subject too.

In the miniature a mask has 8 x 8 places, with SDXL at 1024 it has 64 x 64. So here the cut-out takes some ground along and leaves
an ear behind, and the colours drift from round to round. The miniature also looks anywhere for the small words of a phrase: here
the wide word stands in the last round only, whose mask cuts nothing out.

## What to change
- The **sentences** and **words**. A later word may name more than the former, such as *dog*, then *dog with the pink hat*: the
  hat that round 1 invents is part of the subject of round 2. The words must stand in the sentence as they are.
- A fourth round: copy the last groups, with its picture and mask as you see it between round 1 and round 2.
- Several pictures: each is cut out with its own mask, and all of them together are the next reference.""",
        OWN_PICTURE, MINIATURE, OWN_REALCUSTOM, GUIDED_TOO),
}
